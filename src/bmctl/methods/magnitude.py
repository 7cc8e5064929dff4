from typing import Literal
from bmctl.schema import ModuleStepConfig
class Config(ModuleStepConfig):
    method: Literal["magnitude"] = "magnitude"
