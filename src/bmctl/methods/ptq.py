from typing import Literal
from bmctl.schema import StepConfig
class Config(StepConfig):
    method: Literal["ptq"] = "ptq"
