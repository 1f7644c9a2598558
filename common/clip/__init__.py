"""CLIP by open_clip: any model it knows with any weights, in one form.

A model is a name of open_clip or a folder, of transformers or with `open_clip_config.json`, such as
checkpoints/clip_shapes.
"""
