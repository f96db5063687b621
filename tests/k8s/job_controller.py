"""What controllers do when a pod of ours ends, as small models: Job, JobSet, Argo's retries.

A model knows the rules that our manifests use, and fails on a field of a failure policy that it does not know. Sources:

- Jobs: kubernetes.io/docs/concepts/workloads/controllers/job (pod backoff failure policy, backoff limit per index, pod
  failure policy), KEP-3329 (retriable and non-retriable pod failures), KEP-3850 (backoff limits per index); where these
  are silent, kubernetes/kubernetes pkg/controller/job: pod_failure_policy.go, backoff_utils.go, indexed_job_utils.go.
- JobSets: jobset.sigs.k8s.io/docs/concepts (failure policy).
- Argo: argo-workflows.readthedocs.io/en/latest/retries (retryPolicy, expression).
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

Object = dict[str, Any]
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds between the end of a pod and its replacement: the first, and the limit of their doubling."""


def action(policy: Object, code: int, conditions: Iterable[str] = ()) -> str:
    """Return the action of the first rule that matches a pod that failed; Count if none does.

    Exit codes are those of all its containers, init containers included; 0 never matches.
    """
    for rule in policy.get("rules", []):
        assert set(rule) <= {"action", "onExitCodes", "onPodConditions"}, rule
        assert rule["action"] in ("Ignore", "Count", "FailJob", "FailIndex"), rule
        if "onExitCodes" in rule:
            assert set(rule["onExitCodes"]) == {"operator", "values"}, rule
            inside = code in rule["onExitCodes"]["values"]
            if code != 0 and inside == (rule["onExitCodes"]["operator"] == "In"):
                return str(rule["action"])
        elif any(known["type"] in conditions and known["status"] == "True" for known in rule["onPodConditions"]):
            return str(rule["action"])
    return "Count"


class Job:
    """A Job: which of its indexes are done or failed, how often, and how long it waits before the next pod."""

    def __init__(self, spec: Object) -> None:
        self.spec = spec
        self.reason = ""  # why the Job failed; "" while it has not
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self._counted: Counter[int] = Counter()  # by index; under 0 where the limit is for all
        self._ended: Counter[int] = Counter()  # since the last success; those that are not counted as well

    @property
    def by_index(self) -> bool:
        """Whether failures count for each index, not for all pods together."""
        return "backoffLimitPerIndex" in self.spec

    @property
    def limit(self) -> int:
        """Failures after which the next one is the last."""
        return int(self.spec["backoffLimitPerIndex" if self.by_index else "backoffLimit"])

    @property
    def complete(self) -> bool:
        """Whether every index has succeeded."""
        return len(self.done) == int(self.spec["completions"])

    def end(self, code: int, index: int = 0, conditions: Iterable[str] = ()) -> None:
        """A pod has ended. Restarts in place do not occur: a podFailurePolicy requires restartPolicy Never."""
        if self.reason or self.complete or index in self.done | self.failed:
            raise AssertionError("a Job that is finished starts no pod, nor does an index")
        key = index if self.by_index else 0
        if code == 0:
            self.done.add(index)
            self._ended[key] = 0
            return self._close()
        self._ended[key] += 1
        found = action(self.spec.get("podFailurePolicy", {}), code, conditions)
        self._counted[key] += found != "Ignore"
        if found == "FailJob":
            self.reason = "PodFailurePolicy"
        elif found == "FailIndex" or (self.by_index and found != "Ignore" and self._counted[key] > self.limit):
            self.failed.add(index)
            self._close()
        elif not self.by_index and self._counted[key] > self.limit:
            self.reason = "BackoffLimitExceeded"

    def _close(self) -> None:
        """Fail the Job when too many indexes have failed, or when nothing is left to do."""
        if "maxFailedIndexes" in self.spec and len(self.failed) > self.spec["maxFailedIndexes"]:
            self.reason = "MaxFailedIndexesExceeded"
        elif self.failed and len(self.done | self.failed) == self.spec["completions"]:
            self.reason = "FailedIndexes"

    def pause(self, index: int = 0) -> float:
        """Return the seconds that the next pod (of this index) waits after the last one has ended."""
        ended = self._ended[index if self.by_index else 0]
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (min(ended, 16) - 1)) if ended else 0.0


class JobSet:
    """A JobSet of one replicated Job: what its failure policy makes of that Job's failure."""

    def __init__(self, spec: Object) -> None:
        (replicated,) = spec["replicatedJobs"]
        self.policy, self.template = spec.get("failurePolicy", {}), replicated["template"]["spec"]
        self.limit = int(self.policy.get("maxRestarts", 0))
        self.restarts, self.reason, self.job = 0, "", Job(self.template)

    @property
    def complete(self) -> bool:
        """Whether its Job is complete."""
        return self.job.complete

    def end(self, code: int, index: int = 0, conditions: Iterable[str] = ()) -> None:
        """A pod has ended: perhaps its Job has failed, and then a rule decides, else the set starts again."""
        self.job.end(code, index, conditions)
        if not self.job.reason:
            return
        found = "RestartJobSet"
        for rule in self.policy.get("rules", []):
            assert set(rule) <= {"name", "action", "onJobFailureReasons"}, rule
            if self.job.reason in rule.get("onJobFailureReasons", [self.job.reason]):
                found = rule["action"]
                break
        assert found in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"), found
        if found == "FailJobSet" or (found == "RestartJobSet" and self.restarts >= self.limit):
            self.reason = "FailedJobs"
            return
        self.restarts += found == "RestartJobSet"
        self.job = Job(self.template)


class ArgoStep:
    """A task of an Argo workflow: its retryStrategy, with the expression evaluated."""

    def __init__(self, strategy: Object) -> None:
        assert strategy["retryPolicy"] == "Always"  # of nodes that failed, and of those in error
        self.limit, self.reason, self.complete, self._retries = int(strategy["limit"]), "", False, 0
        self._expression = strategy["expression"]

    def end(self, code: int, index: int = 0, conditions: Iterable[str] = ()) -> None:
        """A pod has ended. One that was taken away is an Error without an exit code."""
        if code == 0:
            self.complete = True
        elif self._retries >= self.limit or not self._evaluate("Error" if conditions else "Failed", code):
            self.reason = "RetryStrategy"
        self._retries += 1

    def _evaluate(self, status: str, code: int) -> bool:
        last = SimpleNamespace(status=status, exitCode="-1" if status == "Error" else str(code))
        python = re.sub(r"!(?!=)", " not ", self._expression.replace("||", " or ").replace("&&", " and ")).strip()
        return bool(eval(compile(ast.parse(python, mode="eval"), "", "eval"), {"asInt": int, "lastRetry": last}))


def verdict(start: Callable[[], "Job | JobSet | ArgoStep"], code: int, conditions: Iterable[str] = ()) -> str:
    """Return what becomes of a step whose pods end like this again and again.

    done; fails: at once; again: started as often as its limit says; always: started however often.
    """
    step = start()
    for number in range(2 * step.limit + 3):
        step.end(code, conditions=conditions)
        if step.complete:
            return "done"
        if step.reason and number == 0:
            return "fails"
        if step.reason:
            assert number == step.limit, f"failed after {number} starts, expected {step.limit}"
            return "again"
    return "always"
