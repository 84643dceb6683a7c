"""omni-cache: a torch.compile backend that reuses what hardly changes between denoising steps."""

__version__ = "0.1.0"
