"""Put tune2gguf.pth into editable installs too; hatchling's force-include reaches wheels only."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditablePthHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        build_data["force_include_editable"][str(Path(self.root) / "tune2gguf.pth")] = "tune2gguf.pth"
