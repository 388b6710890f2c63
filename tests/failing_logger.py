"""A metric logger that fails while a run goes on, as one does whose disk is full or whose service is gone."""

from pathlib import Path

from torchtune.training.metric_logging import MetricLoggerInterface


class FailingLogger(MetricLoggerInterface):
    """Writes the steps that it gets to a file, and takes no more than two lines; it cannot even be closed."""

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
