# The image for GPUs: NVIDIA's PyTorch container with megatron-adams in it, for x86-64 and ARM.
#
#   docker/build.sh gpu
#
# The container brings torch, TransformerEngine, Apex, NCCL and CUDA, compiled against each other.
# docker/constraints.py keeps all of them as they are. See docs/images.md.

# PyTorch 2.14.0a0, CUDA 13.4, Python 3.12. pyproject.toml admits torch up to 2.14.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.08-py3@sha256:3becd068f49bd2ad38f90db5f9a4803019a76933a24e63d821376c44e7a9200a

FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml setup.py megatron-adams.pth constraints.txt README.md LICENSE ./
COPY docker/build-wheel.sh docker/requirements.py docker/
COPY megatron_adams/ megatron_adams/
RUN docker/build-wheel.sh /dist "recipes"

# What the image is installed with. requirements.txt stays the same while only the sources change.
FROM scratch AS steps
COPY constraints.txt docker/constraints.py docker/install-*.sh docker/create-user.sh /
COPY --from=wheel /dist/requirements.txt /

FROM ${BASE_IMAGE} AS image

RUN --mount=type=bind,from=steps,target=/steps \
    /steps/create-user.sh megatron 10001

# Names of the container's packages that may be exchanged, where pip says that they conflict.
ARG REPLACE=""
# cuda-bindings: pip's CUDA builds of torch bring it, and NVIDIA's own build need not.
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-requirements.sh /steps/requirements.txt /steps/constraints.txt "cuda-bindings<14,>=13"

RUN --mount=type=bind,from=steps,target=/steps --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /steps/install-plugin.sh /dist

# A100, H100 and H200, B200. On other GPUs a job compiles its kernel at its first step.
ARG KERNEL_ARCHS="sm_80 sm_90 sm_100"
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-kernels.sh /opt/megatron-adams/kernels "${KERNEL_ARCHS}"
ENV MEGATRON_ADAMS_CACHE_DIR=/opt/megatron-adams/kernels

COPY examples/ /opt/megatron-adams/examples/
WORKDIR /opt/megatron-adams
# A number, by which Kubernetes can tell that it is not root.
USER 10001

# A job runs here: its memory and its processes are no fault.
HEALTHCHECK --interval=5m --timeout=1m --retries=1 \
    CMD ["megatron-adams", "doctor", "--quick", "--while-running"]
CMD ["megatron-adams", "doctor"]

# Last, since they change with each commit.
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="megatron-adams" \
      org.opencontainers.image.description="AdamS for NVIDIA Megatron-Core, in NVIDIA's PyTorch container" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
