"""What all problems share: the diffusion core, the training loop, data, images and metrics. Imports
no problem folder."""
