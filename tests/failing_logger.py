"""A metric logger that fails during a run, as with a full disk or a lost service."""

from pathlib import Path

from torchtune.training.metric_logging import MetricLoggerInterface


class FailingLogger(MetricLoggerInterface):
    """Writes steps to a file, fails after two lines, and fails on close."""

    def __init__(self, path: str) -> None:
        self.path, self.num_lines = Path(path), 0

    def log_config(self, config) -> None:
        self.path.touch()

    def log(self, name, data, step) -> None:
        raise NotImplementedError

    def log_dict(self, payload, step) -> None:
        self.num_lines += 1
        if self.num_lines > 2:
            raise RuntimeError("the service\nis gone")
        with self.path.open("a") as file:
            file.write(f"{step}\n")

    def close(self) -> None:
        raise OSError(28, "No space left on device")
