"""CRIS as an architecture: CLIP backbone, FPN neck, vision-language decoder, projector.

Legend, used in every file here: B batch, C channels, H W map size, L tokens, D embedding width,
S side of the square network input in pixels. "Stride 16" is a map of S/16 × S/16.
"""
