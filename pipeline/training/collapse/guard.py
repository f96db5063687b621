"""`schedule.on_collapse`: a run that has fallen apart says so, ends, or goes back to its best checkpoint."""

import logging
from typing import TYPE_CHECKING

from pipeline.common.errors import Collapsed
from pipeline.common.records import parse_json
from pipeline.evaluation.metrics.collapse import IN_A_ROW, REVERTED, CollapseDetector, Evaluation
from pipeline.training.accelerator import from_main
from pipeline.training.collapse.reverts import Revert
from pipeline.training.manager import CheckpointManager
from pipeline.training.run_log import RunLog
from pipeline.training.step import AdversarialStep

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_REVERTS = 3
"""Times that a run goes back by itself. A fourth would try a sixteenth of rates that were not what is wrong."""

log = logging.getLogger(__name__)


class Guard:
    """Looks at each evaluation. The main process decides, by its metrics.jsonl; all ranks then do the same."""

    def __init__(
        self, accelerator: "Accelerator", step: AdversarialStep, manager: CheckpointManager, run_log: RunLog
    ) -> None:
        self.accelerator = accelerator
        self.step = step
        self.manager = manager
        self.run_log = run_log
        self.ended = ""
        """Why the run ends here, on every rank; '' while it goes on."""
        self._detector = CollapseDetector(manager.config.recipe.batch)
        self._read_bytes = 0  # of metrics.jsonl: of a run that resumes all of it, so that it judges as if never stopped

    def look(self, images_seen: int, *, finished: bool) -> bool:
        """Do what the evaluation that was just recorded asks for; return whether its checkpoint may be the best.

        A bad one may not, unless the run only warns: its SWD may be small all the same. All ranks call it at the same
        position. At the end of a run there is nothing left to end or to mend, so it only says what it sees.
        """
        bad, reverts = from_main(self.accelerator, self._judge), self.manager.reverts
        wanted, collapsed = self.manager.config.schedule.on_collapse, len(bad) >= IN_A_ROW
        self.run_log.collapse(collapsed, len(reverts))
        if not collapsed:
            return wanted == "warn" or not bad
        why = f"the run has fallen apart at image {images_seen:,}: {'; '.join(bad[-1].reasons)}"
        advice = f"try {bad[-1].advice}"
        if wanted == "warn" or finished:
            if len(bad) == IN_A_ROW and self.run_log.run is not None:  # not again at the evaluations that follow
                log.warning("%s; %s, or schedule.on_collapse=revert, which goes back by itself", why, advice)
            return wanted == "warn"
        if wanted == "revert" and len(reverts) < MOST_REVERTS:
            if self._go_back(bad, images_seen, why):
                return False
            advice = f"no sound checkpoint from before is there to go back to; {advice}"
        elif wanted == "revert":
            advice = f"it has gone back {MOST_REVERTS} times; {advice}"
        self.ended = f"{why}; {advice}"
        return False

    def require_sound(self, newest: str) -> None:
        """Raise Collapsed, on every rank, when that is why the run has ended; `newest` is its last checkpoint."""
        if not self.ended:
            return
        best = self.manager.store.best() if self.run_log.run is not None else None
        kept = f"the best checkpoint is {self.manager.store.path(best)}, " if best else ""
        error = Collapsed(f"{self.ended}; {kept}the last {newest}: schedule.on_collapse=warn goes on from there")
        error.on_all_ranks = True
        raise error

    def _judge(self) -> list[Evaluation]:
        """Return the bad evaluations in a row up to here."""
        assert self.run_log.run is not None  # as on every main process
        with self.run_log.run.metrics.open("rb") as file:
            file.seek(self._read_bytes)
            while line := file.readline():
                self._detector.add(parse_json(line, file.name))
            self._read_bytes = file.tell()
        return self._detector.bad

    def _go_back(self, bad: list[Evaluation], images_seen: int, why: str) -> bool:
        """Take the weights of the best checkpoint from before the bad evaluations; return whether there is one."""
        checkpoint = self.manager.best_before(bad[0].images)
        if checkpoint is None:
            return False
        reasons = list(bad[-1].reasons)
        self.manager.go_back(
            self.step, checkpoint, Revert(images=images_seen, to=checkpoint.images_seen, reasons=reasons)
        )
        times = len(self.manager.reverts)
        self.run_log.collapse(False, times)
        if (run := self.run_log.run) is not None:
            run.record(images_seen, {REVERTED: checkpoint.images_seen})
            log.warning(
                "%s; going on with the weights of %s and 1/%d of the learning rates", why, checkpoint.path, 2**times
            )
        return True
