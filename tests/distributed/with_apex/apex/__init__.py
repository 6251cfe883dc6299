"""A stand-in for NVIDIA Apex, in PyTorch: what Megatron-Core 0.19 imports where Apex is installed.

With it Megatron takes the branches of a GPU machine (`HAVE_APEX_OR_TE`, `USING_APEX_OPTIMIZER`).
Nothing of Apex's kernels is tested by it. Found through `Cluster(extra_path=...)` alone.
"""
