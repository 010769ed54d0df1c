"""D3, position-aware depth decay decoding: later tokens pass through fewer layers.

Usable without the trainer::

    from graftwork_d3 import DepthSchedule, depth_decay

    schedule = DepthSchedule.of(layers=30, target_ratio=0.8, expected_tokens=200)
    with depth_decay(model, schedule) as depth:
        output = model(prompt, use_cache=True)              # the prompt: all layers
        for step in range(1, 200):
            depth.step(step)
            output = model(token, past_key_values=output.past_key_values)
"""

from graftwork_d3.controller import DepthController, depth_decay
from graftwork_d3.flops import Cost, cost_of
from graftwork_d3.report import DepthReport
from graftwork_d3.schedule import DepthSchedule
from graftwork_d3.score import teacher_forced

__all__ = [
    "Cost",
    "DepthController",
    "DepthReport",
    "DepthSchedule",
    "cost_of",
    "depth_decay",
    "teacher_forced",
]
