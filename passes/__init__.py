"""Graph passes: find the block loop in a Dynamo graph and wrap it in a guarded region.

Knows graphs only: imports torch and nothing else of ours.
"""
