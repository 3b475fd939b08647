"""The transformer as a list of layers: OLMo2, Olmo3, Llama or Olmoe blocks, over-encoded input, language-model head.

assembly.py builds it from a configuration; process groups, kernels and sizes are arguments of every layer.
"""
