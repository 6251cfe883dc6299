# The image for rehearsals and continuous integration: no GPU, no CUDA, no compiler.
#
#   docker/build.sh cpu
#
# See docs/images.md.

ARG BASE_IMAGE=python:3.12.15-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3

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

# The compiler stays in this stage.
FROM ${BASE_IMAGE} AS environment
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-packages.sh g++ && \
    python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# torch's own index has builds without CUDA: 0.2 GB instead of 3.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-torch-cpu.sh /steps/constraints.txt "${TORCH_INDEX}"
# A layer of its own: torch stays where only other requirements change.
# hadolint ignore=DL3059
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-requirements.sh /steps/requirements.txt /steps/constraints.txt
RUN --mount=type=bind,from=steps,target=/steps --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /steps/install-plugin.sh /dist

# The modes of fp32, bf16 and fp16 training, with and without the update RMS. A rehearsal in any
# other mode computes the same bits in plain torch operations.
ARG KERNEL_ARCHS="x86-64-v2 x86-64-v3 x86-64-v4"
ARG KERNEL_MODES="g32-p32-m32-w0 g32-pb16-m32-w32 g32-p16-m32-w32 gb16-pb16-m32-w32 g32-pb16-m32-wr"
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-kernels.sh /opt/megatron-adams/kernels "${KERNEL_ARCHS}" "${KERNEL_MODES}"

FROM ${BASE_IMAGE} AS image
# libgomp1: the kernels run on all cores through OpenMP.
RUN --mount=type=bind,from=steps,target=/steps \
    /steps/install-packages.sh libgomp1 && \
    /steps/create-user.sh megatron 10001

COPY --from=environment /opt/ /opt/
ENV PATH=/opt/venv/bin:$PATH \
    MEGATRON_ADAMS_CACHE_DIR=/opt/megatron-adams/kernels

COPY examples/ /opt/megatron-adams/examples/
WORKDIR /opt/megatron-adams
# A number, by which Kubernetes can tell that it is not root.
USER 10001

HEALTHCHECK --interval=5m --timeout=1m --retries=1 \
    CMD ["megatron-adams", "doctor", "--quick", "--cpu-rehearsal"]
CMD ["megatron-adams", "doctor", "--cpu-rehearsal"]

# Last, since they change with each commit.
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="megatron-adams" \
      org.opencontainers.image.description="AdamS for NVIDIA Megatron-Core, for rehearsals on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
