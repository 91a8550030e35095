"""Operations as Triton kernels, for CUDA; each file has the name of the file above that defines what it computes.

Import them only where they are used: importing them imports Triton. On a CPU they run in Triton's interpreter, which
the variable TRITON_INTERPRET=1 turns on before Triton is imported.
"""
