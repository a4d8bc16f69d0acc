"""Compiles CUDA C with g++ and runs it on the CPU; the stand-in for cupy is a layer over this."""
