"""Saving a checkpoint: room checked, content taken, files written aside, the folder published, surplus ones removed.

    every rank takes its content (with --async-save a copy) -> writes its share, and with --save-safetensors its tensors
    of the HF folder, into .iter_N.partial, in a thread with --async-save -> once all have written, rank 0 publishes the
    folder, then the tracker, then removes what is surplus

One checkpoint is under way at a time. A kill at any moment leaves the checkpoint before standing.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.atomic import StagedDirectory, iteration_folder, write_tracker
from mindspeed_llm.checkpoint.formats.torch_dist_shards import STEP, merge_shares, write_shares
from mindspeed_llm.checkpoint.formats.torch_file import write_torch_file
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE
from mindspeed_llm.checkpoint.metadata import Metadata, write_metadata
from mindspeed_llm.checkpoint.sizes import free_space, human
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.training import checkpointing
from mindspeed_llm.training.checkpointing import barrier, current_place, own_place
from mindspeed_llm.training.engine import finish_parameter_sync
from mindspeed_llm.training.export import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    ModelExport,
    export_adapter,
    exported_model,
    sum_over_ranks,
)
from mindspeed_llm.training.optimizer_state import engine_settings
from mindspeed_llm.training.report import say
from mindspeed_llm.training.retention import about_to_save, best_checkpoint, iterations, link_best, remove, surplus
from mindspeed_llm.training.setup import Run

OPTIMIZER_BYTES = 12
"""Of optimizer state per trained parameter: the fp32 master weight and Adam's two moments."""


class Worker:
    """A function that runs in a thread of its own, or at once; its error is raised where its end is waited for."""

    def __init__(self, task: Callable[[], Any], threaded: bool) -> None:
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        if not threaded:
            task()
            return
        self.thread = threading.Thread(target=self._run, args=(task,), name="checkpoint")
        self.thread.start()

    def _run(self, task: Callable[[], Any]) -> None:
        try:
            task()
        except BaseException as error:
            self.error = error

    @property
    def busy(self) -> bool:
        """Whether it still runs; raises its error once it has ended by one."""
        if self.thread is not None and self.thread.is_alive():
            return True
        self.wait()
        return False

    def wait(self) -> None:
        """Wait for its end and raise its error, if any."""
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            raise self.error


@dataclass
class Pending:
    """A checkpoint under way.

    Attributes:
        staged: its folder. progress, metadata: what it says about itself.
        worker: what writes this rank's share, and then, on rank 0, publishes all.
        common: what all ranks' files say alike.
        export: the HF folder in it; None without one.
        began: when its saving began, by `time.perf_counter`. waited: seconds training has waited for it.
        written: whether every rank has written its share, so that it is rank 0's to publish.
    """

    staged: StagedDirectory
    progress: checkpointing.Progress
    metadata: Metadata
    nbytes: int
    worker: Worker
    common: dict[str, Any]
    export: ModelExport | None
    began: float
    waited: float
    written: bool = False


class Saver:
    """Saves the checkpoints of one run; every method is called by all ranks, at the same step."""

    def __init__(self, run: Run) -> None:
        """Find out which ranks write, how large a checkpoint is, and whether there is room for one; collective.

        Raises:
            InputError: there is no room for one checkpoint.
        """
        self.run = run
        self.folder = Path(run.options.checkpoint.save or "")
        self.threaded = run.options.checkpoint.async_save
        self.distributed = run.options.checkpoint.ckpt_format == "torch_dist"
        self.table = WeightTable(run.metadata.model)
        self.writes = checkpointing.first_of_its_place()
        self.nbytes = sum_over_ranks(self.own_bytes() if self.writes else 0, self.place) + self.exported_bytes()
        self.pending: Pending | None = None
        self.check_room_for_run()

    @property
    def place(self) -> torch.device:
        """This rank's device."""
        return current_place(self.run.device)

    @property
    def adapter_only(self) -> bool:
        """Whether the frozen base is left out."""
        return self.run.start.settings is not None and self.run.options.lora.lora_ckpt_filter

    def own_bytes(self) -> int:
        """Bytes of tensors in this rank's file."""
        nbytes = 0
        for chunk in self.run.engine.chunks:
            nbytes += sum(
                v.nbytes for v in checkpointing.model_state(chunk, self.adapter_only).values() if v is not None
            )
            if not self.run.options.checkpoint.no_save_optim:
                nbytes += OPTIMIZER_BYTES * sum(p.numel() for p in checkpointing.trainable(chunk).values())
        return nbytes

    def exported_bytes(self) -> int:
        """Bytes of the model that --save-safetensors writes; an adapter's are few."""
        export = self.run.export
        if export is None or not export.model:
            return 0
        model = exported_model(self.run.metadata.model, export.settings)
        sizes = (torch.Size(entry.shape).numel() for entry in WeightTable(model).entries.values())
        return getattr(torch, model.dtype).itemsize * sum(sizes)

    def room(self) -> int:
        """Bytes free for checkpoints, as rank 0 sees them; collective."""
        return sum_over_ranks(free_space(self.folder) if self.run.first_rank else 0, self.place)

    def check_room_for_run(self) -> None:
        """Refuse a run that cannot save once; warn when it cannot save as often as it is asked to."""
        options, free = self.run.options.checkpoint, self.room()
        if free < self.nbytes:
            raise InputError(
                f"--save {self.folder}: a checkpoint needs {human(self.nbytes)}, its file system has {human(free)} "
                "free; free some room or choose another folder"
            )
        left = self.run.train_iters - self.run.progress.iteration
        times = max(1, -(-left // (options.save_interval or left or 1)))
        if options.save_total_limit is not None:
            times = min(times, options.save_total_limit + 1)
        if free < times * self.nbytes and self.run.first_rank:
            say(
                f"warning: {times} checkpoints of {human(self.nbytes)} need {human(times * self.nbytes)}, the file "
                f"system of {self.folder} has {human(free)} free; --save-total-limit keeps fewer"
            )

    def save(self, loss: float | None, last: bool) -> bool:
        """Save the run as it stands; -> whether there was room for it.

        With --async-save files may still be written when it returns.

        Args:
            loss: the validation loss of this very step; None without one.
            last: nothing is trained afterwards.

        Raises:
            InputError: there is no room for the last checkpoint of the run.
        """
        self.finish()
        run, iteration = self.run, self.run.progress.iteration
        free = self.room()
        if free < self.nbytes:
            lack = (
                f"the checkpoint of step {iteration} needs {human(self.nbytes)}, the file system of {self.folder} has "
                f"{human(free)} free"
            )
            if last:
                raise InputError(f"{lack}; nothing was written: free some room, then go on with --auto-resume")
            if run.first_rank:
                say(f"warning: {lack}; it is not saved, and training goes on")
            return False
        if run.first_rank:
            say(
                f"saving checkpoint at iteration {iteration:7d} to {self.folder} in "
                f"{run.options.checkpoint.ckpt_format} format"
            )
        run.progress = about_to_save(run.progress, loss)
        self.begin()
        if not self.threaded:
            self.finish()
        return True

    def begin(self) -> None:
        """Take the content of a checkpoint, and write this rank's share, or let a thread do it."""
        began, run, options = time.perf_counter(), self.run, self.run.options.checkpoint
        staged = StagedDirectory(self.folder / iteration_folder(run.progress.iteration))
        metadata = replace(run.metadata, iteration=run.progress.iteration)
        finish_parameter_sync(run.engine)
        if run.first_rank:
            staged.create()
        barrier(run.device)
        content = checkpointing.rank_content(
            run.engine, metadata, run.progress, run.device, self.adapter_only, not options.no_save_optim,
            not options.no_save_rng, copied=self.threaded,
        )  # fmt: skip
        export = None
        if run.export is not None and run.export.model:
            chunks, keys = run.engine.chunks, metadata.layout.model_keys()
            copies = [content[key] for key, _ in zip(keys, chunks, strict=True)] if self.threaded else None
            export = ModelExport(chunks, metadata.model, staged.path, run.export, self.place, copies)
        common = self.common_of(content) if self.distributed and run.first_rank else {}
        tasks = [self.writing_of(content, staged.path, metadata)] if self.writes else []
        tasks += [export.write] if export is not None else []
        worker = Worker(lambda: [task() for task in tasks], self.threaded)
        waited = time.perf_counter() - began
        self.pending = Pending(
            staged, run.progress, metadata, self.nbytes, worker, common, export, began, waited
        )  # fmt: skip

    def common_of(self, content: dict[str, Any]) -> dict[str, Any]:
        """What all ranks' files say alike, from what this rank's is to hold."""
        common = {key: value for key, value in content.items() if not isinstance(value, dict | list)}
        if content.get("optimizer"):
            common[STEP] = step = content["optimizer"]["step"]
            common["optimizer"] = engine_settings(self.run.engine.optimizer, step)
        return {**common, "validation": content["validation"]}

    def writing_of(self, content: dict[str, Any], folder: Path, metadata: Metadata) -> Callable[[], None]:
        """What writes this rank's share of a checkpoint."""
        place = own_place()
        if not self.distributed:
            return lambda: write_rank_file(folder, metadata, place, content)
        owner = checkpointing.owner(self.run.engine, metadata)
        rank = torch.distributed.get_rank()
        return lambda: write_shares(folder, rank, place, content, self.table, owner)

    @property
    def writing(self) -> bool:
        """Whether this rank still writes its share; raises the error that ended a thread."""
        pending = self.pending
        if pending is None:
            return False
        busy = pending.worker.busy
        if pending.written and not busy:
            self.pending = None
        return busy and not pending.written

    def progressed(self, writing: bool) -> None:
        """Called between steps with whether any rank is writing: once none is, rank 0 publishes, in a thread."""
        pending = self.pending
        if pending is None or writing or pending.written:
            return
        pending.written = True
        if pending.export is not None:
            pending.export.check()
        if self.run.first_rank:
            pending.worker = Worker(lambda: self.publish(pending), True)
        else:
            self.pending = None

    def finish(self) -> None:
        """Wait until the checkpoint under way, if any, is published."""
        began = time.perf_counter()
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.worker.wait()
        if pending is not None and not pending.written:
            if pending.export is None:
                barrier(self.run.device)
            else:
                pending.export.check()  # waits for all ranks, too
            if self.run.first_rank:
                pending.waited += time.perf_counter() - began
                self.publish(pending)
        barrier(self.run.device)

    def publish(self, pending: Pending) -> None:
        """Give the checkpoint its name, then the tracker; remove what is surplus. On rank 0."""
        staged, export = pending.staged, self.run.export
        write_metadata(staged.path, pending.metadata)
        if self.distributed:
            merge_shares(staged.path, self.table, pending.common)
        told = []
        if export is not None and export.model:
            without = ", without its prediction layers" if pending.metadata.model.mtp_num_layers else ""
            pending.export.finish()
            told.append(f"{staged.final / MODEL_FOLDER}: the model for transformers{without}")
        if export is not None and export.adapter:
            told.append(f"{staged.final / ADAPTER_FOLDER}: {export_adapter(staged.path, export)}")
        staged.publish()
        write_tracker(self.folder, pending.progress.iteration)
        whole = time.perf_counter() - pending.began
        waited = pending.waited if self.threaded else whole
        say(
            f"  successfully saved checkpoint from iteration {pending.progress.iteration:7d} to {self.folder}: "
            f"{human(pending.nbytes)} in {whole:.2f} s, training waited {waited:.2f} s"
        )
        for line in told:
            say(f"  {line}")
        for old in self.run.start.stale:
            if old.resolve() != staged.final.resolve() and old.exists():
                remove(old)
        self.run.start = replace(self.run.start, stale=())
        self.tidy(pending.progress)

    def put_right(self) -> None:
        """Do what a kill, behind the publication of the checkpoint that is continued, left undone."""
        resumed = self.run.start.resume
        if self.run.first_rank and resumed is not None and iterations(self.folder)[-1:] == [resumed.folder]:
            write_tracker(self.folder, self.run.progress.iteration)
            self.tidy(self.run.progress)

    def tidy(self, progress: checkpointing.Progress) -> None:
        """Point to the best checkpoint; remove those beyond the limit."""
        best = best_checkpoint(self.folder, progress)
        if best is not None:
            link_best(self.folder, best)
        for old in surplus(iterations(self.folder), self.run.options.checkpoint.save_total_limit, best):
            remove(old)
            say(f"  removed {old.name}: --save-total-limit {self.run.options.checkpoint.save_total_limit}")


def write_rank_file(checkpoint: Path, metadata: Metadata, place: Any, content: dict[str, Any]) -> None:
    """Write one rank's file of the `torch` format.

    Args:
        place: the rank's numbers, which name its folder.
    """
    path = checkpoint / metadata.layout.rank_folder(*place) / CHECKPOINT_FILE
    path.parent.mkdir(exist_ok=True)
    write_torch_file(path, content)
