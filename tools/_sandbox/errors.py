"""The one error of the sandbox: its text says what, where, and what to do next."""


class SandboxError(Exception):
    """Shown to the user as it is; the command then exits with code 1."""
