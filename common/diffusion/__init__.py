"""The diffusion process: schedule, noising, loss, guidance and samplers."""
