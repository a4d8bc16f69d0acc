"""The CUDA driver's errors, which a launch raises."""

__all__ = ["CUDADriverError"]


class CUDADriverError(RuntimeError):
    """cupy builds the message from a status; here the text is given, too."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status
