"""From the workers to the futures: what workers write, and what they leave undone. On the dispatcher's thread."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, TypeGuard

from taskpool._engine import autopsy, verdicts, wire
from taskpool._engine.callbacks import CallbackThread
from taskpool._engine.channel import ANY_ITEM
from taskpool._engine.crew import Counts, Crew, Settings
from taskpool._engine.feeder import Feeder
from taskpool._engine.handle import SERVING, WorkerHandle
from taskpool._engine.loop import Loop
from taskpool._engine.memory import LARGE, Blocks
from taskpool._engine.outcomes import EncodedError
from taskpool._engine.outputs import Outputs
from taskpool._engine.reports import Reports
from taskpool._engine.retries import CANCELLED, CRASHED, FAILED, FINISHED, TIMED_OUT, Ended, Retries
from taskpool._engine.telling import Teller
from taskpool._engine.units import Piece, Range, Unit, settled_by
from taskpool._engine.wire import BadFrameError, Frame, Pickled
from taskpool._map import Settled
from taskpool._task import RawOutcome

if TYPE_CHECKING:
    from taskpool.events import How

FINISHING = wire.RESULTS | {wire.RAISED, wire.UNSENDABLE, wire.UNREADABLE, wire.INTERRUPTED, wire.HALTED, wire.UNOPENED}

now = time.monotonic


class Receiver:
    """Reads the workers' frames, and settles every unit of work, once.

    Args:
        loop: The dispatcher's loop.
        crew: The workers.
        feeder: Where what is left to do goes.
        settings: What does not change.
        counts: Where it is noted how tasks ended.
        callbacks: The thread for what may run user code.
        reports: What workers log, and what waits behind that.
        teller: Who tells listeners what has begun.
        outputs: What tasks print.
        blocks: Where large results lie.
    """

    def __init__(
        self,
        loop: Loop,
        crew: Crew,
        feeder: Feeder,
        *,
        settings: Settings,
        counts: Counts,
        callbacks: CallbackThread,
        reports: Reports,
        teller: Teller,
        outputs: Outputs,
        blocks: Blocks,
    ) -> None:
        self.singling: set[Range] = set()  # those whose items are being pickled again, singly
        self.retries: Retries = Retries(loop, feeder, callbacks, counts, settings)
        self._loop = loop
        self._crew = crew
        self._feeder = feeder
        self._settings = settings
        self._is_watched = bool(settings.listeners) or outputs.is_on
        self._counts = counts
        self._callbacks = callbacks
        self._reports = reports
        self._teller = teller
        self._outputs = outputs
        self._blocks = blocks

    # What workers write

    def read(self, worker: WorkerHandle) -> None:
        """Take what the worker has written, in order. Does nothing for one whose channel has ended."""
        try:
            for frame in worker.channel.receive():
                self._on_frame(worker, frame)
        except BadFrameError as error:
            worker.reason = f"what it wrote is not a frame ({error})"
            self._cannot_read(worker)
        except MemoryError:
            if worker.inflight:
                unit = worker.inflight.popleft()
                item = unit.next if isinstance(unit, Range) else 0
                self._fail_item(worker, unit, item, verdicts.no_memory(unit), FAILED)
            self._cannot_read(worker)
        except (EOFError, OSError):
            self._crew.channel_ended(worker)
        finally:
            self._reports.flush()

    def _cannot_read(self, worker: WorkerHandle) -> None:
        """It costs this worker, and the task it has in hand; what follows in the pipe means nothing."""
        self._loop.unwatch(worker.channel.results)
        self._crew.kill(worker)

    def _on_frame(self, worker: WorkerHandle, frame: Frame) -> None:
        if frame.kind in FINISHING:
            body = frame.body
            if body.places or body.buffers or len(body.stream) >= LARGE:
                frame = self._fetched(worker, frame)
            self._on_outcome(worker, frame)
        elif frame.kind == wire.LOG:
            self._reports.add(worker, frame)
        elif frame.kind == wire.BEGUN:
            self._teller.started(worker, frame)
        elif frame.kind == wire.REPORT:
            self._on_report(worker, frame)
        elif frame.kind == wire.HELLO:
            self._crew.process_known(worker, frame.unit)
            self._feeder.send_setup(worker)
        elif frame.kind == wire.READY:
            self._crew.ready(worker)
        elif frame.kind == wire.NOT_READY:
            self._crew.not_ready(worker, EncodedError(frame.body))
        elif frame.kind == wire.GOODBYE:
            self._crew.expect_end(worker)

    def _fetched(self, worker: WorkerHandle, frame: Frame) -> Frame:
        """Return the frame of a large result with what lies in memory, and see that the next one can lie there."""
        if frame.body.places:
            parts = worker.channel.claim(frame.body.places, self._blocks.give_back)
            frame = frame._replace(body=Pickled(frame.body.stream or parts.pop(0), parts))
        size = frame.body.size
        if size >= LARGE and self._blocks.are_usable and worker.channel.lent is None:
            with contextlib.suppress(OSError):  # no room, or no descriptor left
                worker.channel.lend(self._blocks.take(size))
        return frame

    def _on_report(self, worker: WorkerHandle, frame: Frame) -> None:
        unit = worker.inflight[0] if worker.inflight else None
        if unit is not None and unit.id == frame.unit:
            unit.report(frame.item, frame.started, frame.seconds)

    def _on_outcome(self, worker: WorkerHandle, frame: Frame) -> None:
        unit = worker.inflight[0] if worker.inflight else None
        if unit is None or unit.id != frame.unit:
            self._on_early_outcome(worker, frame)
            return
        if frame.kind == wire.INTERRUPTED:
            self._on_interrupted(worker, unit, frame)
        elif frame.kind in (wire.HALTED, wire.UNOPENED):
            self._blocks.are_usable &= frame.kind == wire.HALTED
            worker.inflight.popleft()
            self._feeder.requeue(unit)
            self.next_task(worker)
        elif frame.kind == wire.UNREADABLE and self._has_neighbours(unit):
            worker.inflight.popleft()
            self._send_singly(unit)
            self.next_task(worker)
        elif self._receive(worker, unit, frame):
            worker.finished_one(frame.seconds)
            self.next_task(worker)
        elif worker.stop is not None and not unit.begun(worker.stop.item) and worker.stop.item != ANY_ITEM:
            worker.stop = None  # that item has ended by itself

    def _on_early_outcome(self, worker: WorkerHandle, frame: Frame) -> None:
        """Take an outcome of a unit that is not the first: what stands before it was never sent. Others were given up.

        A worker runs what it gets in order. It never got a call if a signal handler raised in `submit` when that was
        noted, and about to be sent.
        """
        if any(unit.id == frame.unit for unit in worker.inflight):
            while worker.inflight[0].id != frame.unit:
                self._feeder.requeue(worker.inflight.popleft())
            self._on_outcome(worker, frame)

    def _receive(self, worker: WorkerHandle, unit: Unit, frame: Frame) -> bool:
        ok = frame.kind in wire.RESULTS
        policy = unit.options.retry
        is_behind = worker.batches_out != worker.batches_done and self._reports.is_behind(worker)
        if is_behind or self._is_watched or (policy is not None and policy.judges(ok=ok)):
            settled = self._with_output(worker, unit, settled_by(frame, worker.name, unit.attempt))
            self._settle(worker, Ended(unit, settled, FINISHED if ok else FAILED))
            return unit.advance(frame)
        if ok:
            self._counts.finished += frame.items
        else:
            self._counts.failed += 1
        return unit.receive(frame, worker.name)

    def _with_output(self, worker: WorkerHandle, unit: Unit, settled: Settled) -> Settled:
        """Return what is settled, with what its task has printed, where that is kept."""
        if not self._outputs.is_on:
            return settled
        text = "".join(
            self._outputs.take(worker, unit, item) for item in range(settled.item, settled.item + settled.items)
        )
        return settled._replace(output=text)

    def _settle(self, worker: WorkerHandle, ended: Ended) -> None:
        """Settle what has ended, once the records that came before are handled, unless it is tried again."""
        self._reports.hold(worker, lambda: self.retries.consider(ended))

    def next_task(self, worker: WorkerHandle) -> None:
        """Give a worker that has nothing left something else to do, or let it wait."""
        worker.stop = None
        if worker.state != SERVING or worker.inflight:
            return
        feeder = self._feeder
        stays = self._settings.max_tasks is None and not feeder.waits_for_room
        if not (stays and feeder.queue and feeder.send_next(worker)):
            self._crew.make_idle(worker)

    def _on_interrupted(self, worker: WorkerHandle, unit: Unit, frame: Frame) -> None:
        worker.inflight.popleft()
        if not frame.items and self._has_neighbours(unit):
            self._send_singly(unit)  # it was still loading them: none can be blamed yet
        else:
            self._settle_stopped(worker, unit, frame.item, bytes(frame.body.stream).decode(errors="replace"))
        worker.stop = None
        self._crew.expect_end(worker)  # it ends by itself, since the task may have left anything half done

    @staticmethod
    def _has_neighbours(unit: Unit) -> TypeGuard[Range]:
        """Whether items lie in the same pickle that may be the ones to blame, of this range or of others."""
        return isinstance(unit, Range) and len(unit.piece.items) > 1

    def _send_singly(self, unit: Range) -> None:
        """Give a range's items back one by one: together they cannot be read, or one of them kills the reader."""
        self.singling.add(unit)

        def pickle_again() -> None:
            pieces = unit.piece.singly(unit.next, unit.stop) if not unit.job.cancelled else []
            self._loop.post(self._singled, (unit, pieces))

        self._callbacks.run(pickle_again)

    def _singled(self, singled: tuple[Range, list[Piece]]) -> None:
        unit, pieces = singled
        self.singling.discard(unit)
        self._feeder.accept_all(pieces)

    def end(self) -> None:
        """Nothing is read any more, and nobody waits for the callback thread: cancel what is being pickled there."""
        for unit in self.singling:
            for item in range(unit.next, unit.stop):
                unit.settle(Settled(item, 1, verdicts.cancelled(), attempts=unit.piece.attempt - 1))
        self.singling.clear()
        self._reports.end()

    # Tasks that do not end by themselves

    def settle_left(self, worker: WorkerHandle, unit: Unit, item: int | None) -> None:
        """Settle a unit that a dead worker had: `item` ran, or None if it had not started."""
        request = worker.stop
        if item is None:
            self._feeder.requeue(unit)
        elif self._has_neighbours(unit) and worker.is_loading():
            self._send_singly(unit)  # it died unpickling several items: none can be blamed yet
        elif request is not None and request.unit is unit and request.item in (item, ANY_ITEM):
            self._settle_stopped(worker, unit, item, worker.channel.page.stack())
        else:
            self._outputs.flush(worker, unit)
            self._fail_item(worker, unit, item, autopsy.crashed(worker, unit, item), CRASHED)

    def _settle_stopped(self, worker: WorkerHandle, unit: Unit, item: int, stack: str | None) -> None:
        """The task was stopped: it passed its limit, or was cancelled."""
        if worker.stop is not None and worker.stop.timed_out:
            self._fail_item(worker, unit, item, verdicts.timed_out(worker, unit, stack), TIMED_OUT)
        else:
            self._fail_item(worker, unit, item, verdicts.cancelled(), CANCELLED)

    def _fail_item(self, worker: WorkerHandle, unit: Unit, item: int, outcome: RawOutcome, kind: How) -> None:
        """Settle one item of a unit, or have it tried again, and put back what is left of the unit."""
        started = worker.channel.page.current()[2]
        settled = Settled(item, 1, outcome, started, max(0.0, now() - started), worker.name, unit.attempt)
        settled = self._with_output(worker, unit, settled)
        self._settle(worker, Ended(unit, settled, kind))
        if isinstance(unit, Range):
            self._counts.rerun += max(0, item - unit.next)
            piece = unit.rest(item)
            if piece is not None:
                self._feeder.put_back(piece)
