"""The oracle: the whole DiT-MoE in plain PyTorch, slow and readable, in any float dtype including float64.

Read in this order: `routing` (who goes where), `moe` (what the experts do), `rooms` (the same layer in four steps, as
moe_kernels names them), `dit` (the model), `diffusion` (what it is trained on), `samplers` (how images come out),
`checkpoint` (files). Nothing here imports moe_kernels or bench.
"""
