"""A decoder run one layer at a time, with the weights of two layers in memory: what layer offloading is made of.

`gates` lets the decoder's own forward run any stretch of its layers; `files` reads single layers from a checkpoint;
`store` keeps the layer at work and the next one; `waiting` holds hidden states on the host; `trial` finds the
architectures that cannot be run so. Knows nothing of pairs or losses.
"""
