"""The lowering: how a guarded graph becomes callables."""
