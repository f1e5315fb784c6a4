"""Answer a search's questions: from the log of a stopped bisect, from verdicts that are kept, or by
running the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from truestep.experiment.bisecting.isolation import Ran, Setting, environment, filled, run
from truestep.experiment.bisecting.outcomes import judged, kind_of_failure, said
from truestep.experiment.bisecting.records import Attempt
from truestep.experiment.bisecting.search import (
    Answer,
    Conclusion,
    Outcome,
    P,
    Question,
    Search,
    Why,
)
from truestep.experiment.bisecting.store import Store, key_of
from truestep.files import unwritten

Told = Callable[[str, int, int], None]
"""What is done, how often, of how many at most."""


@dataclass(frozen=True)
class Asked:
    """What is run at each point, and how.

    Attributes:
        command: Words, with places in braces.
        kept: Names of fresh variables that are left as they are.
        timeout_s: After which a probe is ended, and its point skipped.
        again: Whether nothing that was kept is an answer.
    """

    command: Sequence[str]
    kept: Sequence[str] = ()
    timeout_s: float | None = None
    again: bool = False


@dataclass
class Prober:
    """Answers, and what they were.

    Attributes:
        store: Where logs and verdicts are kept.
        key: Of this bisect: what is asked of which points.
        base: What all verdicts of it depend on: command, interpreter, files.
        scratch: Folder of what probes need while they run.
    """

    store: Store
    key: str
    base: str
    scratch: Path
    asked: Asked
    limit: int
    told: Told = lambda what, done, most: None
    attempts: list[Attempt] = field(default_factory=list)
    _log: list[Attempt] = field(default_factory=list)
    _failure: str | None = None

    def begin(self) -> None:
        """Read what an earlier start of the same bisect answered."""
        if self.asked.again:
            self.store.forget_log(self.key)
        self._log = self.store.log(self.key)
        self.store.keep_log(self.key, self._log)

    def end(self) -> None:
        """The bisect has come to an answer."""
        self.store.forget_log(self.key)

    @property
    def probes(self) -> int:
        """Runs of the command."""
        return sum(attempt.ran for attempt in self.attempts)

    @property
    def resumed(self) -> int:
        """Answers of an earlier start."""
        return sum(attempt.resumed for attempt in self.attempts)

    @property
    def outdated(self) -> bool:
        """Whether another answer contradicts one of an earlier start or bisect."""
        told = {attempt.key for attempt in self.attempts if _of_before(attempt)}
        seen = {(attempt.key, attempt.outcome) for attempt in self.attempts}
        return any(sum(key == k for k, _ in seen) > 1 for key in told)

    def drive(self, search: Search[P], setting_of: Callable[[P], Setting]) -> Conclusion[P]:
        """Answer a search to its end."""
        try:
            question = next(search)
            while True:
                answer = self._answer(question, setting_of(question.point))
                question = search.send(answer)
        except StopIteration as end:
            conclusion: Conclusion[P] = end.value
            return conclusion

    def _answer(self, question: Question[P], setting: Setting) -> Answer:
        attempt = self._logged(question, setting)
        if attempt is None:
            attempt = self._kept(question, setting) or self._run(question.why, setting)
            self._note(attempt)
        self.attempts.append(attempt)
        if question.why == "bad end" and attempt.outcome is Outcome.BAD:
            self._failure = attempt.failure
        self.told("probes", self.probes, self.limit)
        return Answer(attempt.outcome, attempt.ran)

    def _logged(self, question: Question[P], setting: Setting) -> Attempt | None:
        """The next line of the log, where it answers this question; else the log ends here.

        What asks for the same again is run: what the command hangs on may have changed since then.
        """
        at = len(self.attempts)
        if at >= len(self._log):
            return None
        line = self._log[at]
        if (line.why, line.key) == (question.why, self._key(setting)):
            return None if question.fresh else line.model_copy(update={"resumed": True})
        self._log = self._log[:at]
        self.store.keep_log(self.key, self._log)
        return None

    def _note(self, attempt: Attempt) -> None:
        """Write an answer to the log; a repeat takes the place of that of an earlier start."""
        at = len(self.attempts)
        if at >= len(self._log):
            self.store.append(self.key, attempt)
            return
        self._log[at] = attempt
        self.store.keep_log(self.key, self._log)

    def _kept(self, question: Question[P], setting: Setting) -> Attempt | None:
        """A verdict that lasted in an earlier bisect. What asks for the same again is run."""
        if question.fresh or self.asked.again:
            return None
        kept = self.store.verdict(self._kept_as(self._key(setting)))
        if kept is None:
            return None
        last = kept.runs[-1]
        found = judged(last.exit_code or 0, last.failure, expected=self._failure)
        return last.model_copy(
            update={
                "point": setting.label,
                "why": question.why,
                "outcome": found.outcome,
                "reason": found.reason,
                "ran": False,
                "resumed": False,
            }
        )

    def key_of_point(self, content: str) -> str:
        """Of a point's content: the key of its answers."""
        return key_of([self.base, content])

    def _kept_as(self, key: str) -> str:
        return f"{self.base}-{key}"

    def _key(self, setting: Setting) -> str:
        return self.key_of_point(setting.key)

    def _run(self, why: Why, setting: Setting) -> Attempt:
        folder = self.scratch / f"p{len(self.attempts):03d}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise unwritten(folder, "the folder of a probe", error) from error
        try:
            with setting.place(folder) as place:
                if place.problem:
                    ended = None
                    reason = place.problem
                else:
                    ended = run(
                        filled(self.asked.command, place.words),
                        place.folder,
                        environment(folder, self.asked.kept, place.variables),
                        scratch=folder,
                        timeout_s=self.asked.timeout_s,
                    )
                    reason = ""
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        attempt = self._attempt(why, setting, ended, reason)
        self._keep(attempt)
        return attempt

    def _attempt(self, why: Why, setting: Setting, ended: Ran | None, reason: str) -> Attempt:
        common = {"point": setting.label, "key": self._key(setting), "why": why}
        if ended is None:
            return Attempt(**common, outcome=Outcome.SKIPPED, reason=reason, ran=False)
        failure = kind_of_failure(ended.stdout, ended.stderr) if ended.exit_code else ""
        found = judged(ended.exit_code, failure, expected=self._failure)
        outcome, reason = found.outcome, found.reason
        if ended.timed_out:
            outcome, reason = Outcome.SKIPPED, f"it ran longer than {self.asked.timeout_s:g} s"
        answer = said(ended.stdout)
        if outcome is not Outcome.GOOD and not answer:
            answer = tuple(line for line in ended.stderr.splitlines() if line.strip())[-1:]
        return Attempt(
            **common,
            outcome=outcome,
            exit_code=ended.exit_code,
            failure=failure,
            reason=reason,
            said=answer,
            seconds=round(ended.seconds, 3),
        )

    def _keep(self, attempt: Attempt) -> None:
        before = [a.outcome for a in self.attempts if a.key == attempt.key]
        if before and attempt.outcome is not before[-1]:
            self.store.contradict(self._kept_as(attempt.key))
        else:
            self.store.add(self._kept_as(attempt.key), attempt)


def _of_before(attempt: Attempt) -> bool:
    """Whether an answer was given before this start: by the log, or as a verdict that was kept."""
    return attempt.resumed or (not attempt.ran and attempt.exit_code is not None)
