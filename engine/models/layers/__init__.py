"""Runs a decoder one layer at a time, with the weights of two layers in memory: the basis of layer offloading.

`gates` makes the decoder's own forward run any range of its layers; `files` reads single layers from a checkpoint;
`store` keeps the current layer and the next one; `waiting` keeps hidden states on the host; `trial` detects
architectures that cannot run this way. Independent of pairs and losses.
"""
