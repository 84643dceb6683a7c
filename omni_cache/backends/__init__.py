"""The interface of ``vllm_omni.diffusion.cache``, on this package's own strategies and runtime."""
