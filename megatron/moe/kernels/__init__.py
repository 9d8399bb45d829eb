"""Triton kernels for the experts on a GPU; under TRITON_INTERPRET=1 the same code runs on CPU tensors.

Importing a module of this folder needs triton, so import it where it is used.
"""
