"""The shapes of models that the benchmarks of GPUs measure; llmsrv/selftest makes their weights."""

from llmsrv.selftest.made_models import Shape

# Source: the models' config.json.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, is_tied=True),
        Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, is_tied=True),
        Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, is_tied=False),
        # To try the benchmarks where kernels are emulated.
        Shape("tiny", 2, 256, 512, 4, 2, 64, 1024, is_tied=True),
    )
}
