"""RMSNorm, rotary positions and gated activations: one kernel each on a GPU.

With torch's operations they take 101 launches per Qwen2.5 layer (forward, recomputation and backward) and a third of
its bytes; here they take 12. Each function has its gradient, computes in float32 and rounds once. Knows tensors, not
models.
"""
