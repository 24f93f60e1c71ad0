"""Reports a finished run from its records, without a model or torch, so that it takes a second."""

from __future__ import annotations

import os

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.recipes.inputs import check_held_out, open_inputs
from dpoeng.engine.recipes.phase_two.mode import resolve_mode
from dpoeng.engine.recipes.phase_two.summary import TrainSummary, finished_summary
from dpoeng.engine.runs.checkpoint import read_finished
from dpoeng.engine.runs.folder import result_folder
from dpoeng.engine.runs.identity import changes, run_identity
from dpoeng.engine.runs.lock import holding
from dpoeng.engine.runs.trackers import check_trackers
from dpoeng.engine.runtime.host import group_size


def finished_run(config: TrainConfig) -> TrainSummary | None:
    """The summary of the run in `output_dir` if it is complete and matches `config`, else None.

    None under torchrun, because there the processes have to agree.

    Raises:
        UserError: the cache cannot be read with this configuration, or another process is using the folder.
    """
    if config.resume is False or group_size(os.environ) > 1 or not config.output_dir.is_dir():
        return None
    if read_finished(config.output_dir) is None:
        return None
    with holding(config.output_dir):
        finished = read_finished(config.output_dir)  # read again, now that this process has the lock
        if finished is None:
            return None
        check_trackers(config.report_to)
        inputs = open_inputs(config)
        check_held_out(config, len(inputs.held_out.rows))
        mode = resolve_mode(config, has_adapter=bool(config.adapter or inputs.reference.get("adapter")))
        identity = run_identity(config, inputs.view, inputs.split.eval_view, mode)
        if changes(finished.state["identity"], identity) or not result_folder(config.output_dir, mode).is_dir():
            return None
        return finished_summary(config, inputs, mode, finished)
