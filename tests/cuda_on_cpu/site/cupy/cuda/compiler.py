"""The error of the compiler."""

__all__ = ["CompileException"]


class CompileException(Exception):
    def __init__(
        self, msg: str, source: str, name: str, options: tuple[str, ...], backend: str = "nvrtc"
    ) -> None:
        super().__init__(msg)
        self.source = source
        self.name = name
        self.options = options
        self.backend = backend

    def get_message(self) -> str:
        return str(self)
