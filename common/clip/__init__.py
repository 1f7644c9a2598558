"""CLIP models by open_clip: any of its models, with weights from any supported source.

A model is named by an open_clip name or by a folder: of transformers, or with
`open_clip_config.json`, such as checkpoints/clip_shapes.
"""
