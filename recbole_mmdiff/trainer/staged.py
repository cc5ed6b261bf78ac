"""Training in stages on top of RecBole's Trainer."""

import copy
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from recbole.trainer import Trainer
from recbole.utils import early_stopping, set_color
from tqdm import tqdm

from recbole_mmdiff import distributed
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import Parts
from recbole_mmdiff.diffusion.noise import fold_in
from recbole_mmdiff.errors import TrainingError
from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.sampled_pairwise import SampledPairwise
from recbole_mmdiff.trainer.checkpoint import (
    Progress,
    check_form,
    load_checkpoint,
    load_optimizer,
    load_other_parameters,
    other_parameters,
    random_state,
    restoring,
    save_checkpoint,
    set_random_state,
)
from recbole_mmdiff.trainer.guard import Guard, Losses
from recbole_mmdiff.trainer.sharing import begin_epoch, mean_loss, shared_loader
from recbole_mmdiff.trainer.steps import Stepper


class StagedTrainer(Guard, Trainer):
    """RecBole's Trainer, stage after stage, with exact resume.

    A model that declares ``stages()`` is trained by them; any other has the one stage that RecBole
    would run. Optimisers, early stopping, TensorBoard, W&B, clipping and mixed precision are
    RecBole's; with ``enable_amp`` stages run in bfloat16, with ``enable_scaler`` too in float16.
    Every epoch ends in a checkpoint, from which a killed run gives the numbers of one that was never
    killed.

    Args:
        config: the run's configuration.
        model: the recommender, on its device.
        evaluator: gives the validation score.
        checkpoint: the file to write, and to resume from.
    """

    def __init__(self, config, model, evaluator=None, checkpoint: Path | None = None):
        super().__init__(config, model)
        self.phase_evaluator = evaluator
        if checkpoint is not None:
            self.saved_model_file = str(checkpoint)
        for name in ("seed", "epoch"):
            vars(model).setdefault(name, 0)     # A checkpoint brings back only the numbers that a model has.
        self.progress = Progress()
        self.best: dict | None = None
        self.stepper = Stepper(config, self.device)

    @property
    def staged(self) -> bool:
        """Whether it is trained by stages; everything else is by RecBole's loader and loop."""
        return hasattr(self.model, "stages") or bool(self.config["negative_sampler"])

    # ---- the run -------------------------------------------------------------------------------

    def fit(self, parts: Parts, valid_data=None, verbose=True, saved=True, show_progress=False,
            callback_fn=None, resume: bool = False):
        """Run all stages, or those that are left.

        Args:
            parts: the prepared data; its training part alone is learned from.
            valid_data: unused, for RecBole's signature: validation is the evaluator's.
            saved: write checkpoints.
            callback_fn: called with (epoch, score) after each validation.
            resume: go on from the checkpoint.

        Returns:
            the best validation score and its results, as RecBole's Trainer.
        """
        self.parts, self.verbose, self.saved = parts, verbose, saved and distributed.is_first()
        self.show_progress = bool(show_progress) and sys.stderr.isatty() and distributed.is_first()
        self.callback = callback_fn
        stages = self._declared_stages()
        state = self._restore() if resume else None
        for number in range(self.progress.stage, len(stages)):
            self._run_stage(number, stages[number], state)
            state = None
        self._save(finished=True)
        return self.progress.best_score, self.best_valid_result

    def _declared_stages(self) -> list[Stage]:
        if hasattr(self.model, "stages"):
            return [*self.model.stages(), *self._finetuning_stages()]
        if self.config["negative_sampler"]:
            return [SampledPairwise(self.config, self.model, self.parts.train).stage(self.epochs)]
        return [Stage("training", "target", (self.model.calculate_loss,), self.model.parameters(),
                      self.epochs)]

    def _finetuning_stages(self) -> list[Stage]:
        if "finetune" not in self.parts.aside or not self.config["finetune_epochs"]:
            return []
        stage = self.model.finetuning_stage()
        return [] if stage is None else [stage]

    def _loader(self, stage: Stage, seed: int):
        if self.staged:
            return stage_loader(self.config, self.parts.train, stage.data,
                                stage.batch_size or self.config["train_batch_size"], seed,
                                stage.by_user)
        loader = shared_loader(self.config, self.parts.train)
        if self.config["train_neg_sample_args"].get("dynamic", False):
            loader.get_model(self.model)
        return loader

    def _run_stage(self, number: int, stage: Stage, state: dict | None) -> None:
        """Train one stage; ``state`` is the checkpoint to go on from, if it was saved inside it."""
        self.stage, started = stage, perf_counter() - self.progress.seconds
        seed = fold_in(self.config["seed"], number)
        if self.staged:
            torch.manual_seed(seed)
        self.model.seed = seed
        loader = self._loader(stage, seed)
        self.optimizer = self._build_optimizer(
            params=list(stage.parameters), learning_rate=_or(stage.learning_rate,
                                                             self.learning_rate),
            weight_decay=_or(stage.weight_decay, self.weight_decay))
        if stage.prepare is not None:
            stage.prepare()
        if state is not None:
            self._restore_inside_stage(state, loader)
        distributed.same_weights(self.model)    # Machines may differ in the last digit.
        if self.progress.epoch == 0:
            self._begin_stage(stage)
        while self.progress.epoch < stage.epochs and not self.progress.stopped:
            self._run_epoch(stage, loader)
            self.progress.seconds = perf_counter() - started
            last = self.progress.stopped or self.progress.epoch >= stage.epochs
            if not last and self.progress.epoch % self.config["checkpoint_interval"] == 0:
                self._save(loader)
        self._finish_stage(number)

    def _begin_stage(self, stage: Stage) -> None:
        """A stage chooses among its own epochs, and its start where that may be best."""
        self.progress.best_score, self.progress.best_epoch = None, -1
        if stage.keeps_start and stage.validates and self.phase_evaluator is not None \
                and self.eval_step > 0:
            score = self._validate(stage, -1)["valid_score"]
            self.logger.info(f"{stage.name} start: valid {self.config['valid_metric']} {score:.5f}")

    def _finish_stage(self, number: int) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best["weights"])
            load_other_parameters(self.model, self.best["other_parameter"])
            self.best = None
        kept = self.progress
        self.progress = Progress(stage=number + 1, best_score=kept.best_score,
                                 best_epoch=kept.best_epoch, history=kept.history,
                                 seconds=kept.seconds)
        self._save()

    # ---- one epoch -----------------------------------------------------------------------------

    def _run_epoch(self, stage: Stage, loader) -> None:
        epoch, started = self.progress.epoch, perf_counter()
        self.model.epoch = epoch
        if self.staged:
            with self._watched(epoch), distributed.working_together():
                loss = self._train_stage_epoch(stage, loader, epoch)
        else:
            begin_epoch(self.config, loader, epoch)
            loss = mean_loss(self._train_epoch(loader, epoch, show_progress=self.show_progress))
        entry = {"stage": stage.name, "epoch": epoch,
                 "loss": list(loss) if isinstance(loss, tuple) else loss,
                 # RecBole's loader of knowledge graphs does not tell.
                 "samples": getattr(loader, "sample_size", len(self.parts.train)),
                 "seconds": perf_counter() - started}
        distributed.same_weights(self.model)    # Batch norms of RecBole's models have seen other rows.
        self.progress.epoch += 1
        if stage.validates and self._is_due(epoch):
            entry |= self._validate(stage, epoch)
        self._log(entry)
        self.progress.history.append(entry)

    def _is_due(self, epoch: int) -> bool:
        return self.phase_evaluator is not None and self.eval_step > 0 \
            and (epoch + 1) % self.eval_step == 0

    def _train_stage_epoch(self, stage: Stage, loader, epoch: int) -> tuple[float, ...]:
        """One pass over a stage's data: the mean of each of its losses."""
        self.model.train()
        loader.set_epoch(epoch)
        if stage.before_epoch is not None:
            stage.before_epoch(epoch)
        losses = Losses(len(loader), len(stage.losses), self.device)
        batches = tqdm(loader, desc=f"{stage.name} {epoch}", leave=False, ncols=100,
                       disable=not self.show_progress)
        for number, batch in enumerate(batches):
            batch = batch.to(self.device)
            for which, loss_of in enumerate(stage.losses):
                losses.values[number, which] = self.stepper.step(
                    self.optimizer, loss_of, batch, self.clip_grad_norm if stage.clips else None, number)
            self._refuse_bad_loss(losses, number, epoch)
        if stage.after_epoch is not None:
            stage.after_epoch(epoch)
        return losses.means()

    # ---- validation ----------------------------------------------------------------------------

    def _validate(self, stage: Stage, epoch: int) -> dict:
        try:
            score, result = self.phase_evaluator.score(self.model)
        except TrainingError as error:
            raise TrainingError(f"{error}, after epoch {epoch} of stage {stage.name!r}, though its weights "
                                f"are finite: look at the features{self._way_on(epoch)}") from error
        # All stop in one epoch, though machines may differ in the last digit.
        score, progress = float(distributed.from_first(str(float(score)))), self.progress
        worst = float("-inf") if self.valid_metric_bigger else float("inf")
        best = worst if progress.best_score is None else progress.best_score
        progress.best_score, progress.cur_step, progress.stopped, improved = early_stopping(
            score, best, progress.cur_step, max_step=self.stopping_step,
            bigger=self.valid_metric_bigger)
        if improved:
            progress.best_epoch, self.best_valid_result = epoch, result
            self.best = copy.deepcopy({"weights": self.model.state_dict(),
                                       "other_parameter": other_parameters(self.model)})
        if self.callback:
            self.callback(epoch, score)
        return {"valid_score": score}

    def _log(self, entry: dict) -> None:
        number = len(self.progress.history)
        loss = entry["loss"]
        self._add_train_loss_to_tensorboard(
            number, tuple(loss) if isinstance(loss, list) else loss)
        self.wandblogger.log_metrics({"train_loss": loss, "train_step": number}, head="train")
        text = f"{entry['stage']} epoch {entry['epoch']}: loss {_short(loss)}"
        if "valid_score" in entry:
            self.tensorboard.add_scalar("Vaild_score", entry["valid_score"], number)
            self.wandblogger.log_metrics({"score": entry["valid_score"], "valid_step": number},
                                         head="valid")
            text += f", valid {self.config['valid_metric']} {entry['valid_score']:.5f}"
        if self.verbose:
            self.logger.info(f"{text} ({entry['seconds']:.2f} s)")

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save(self, loader=None, finished: bool = False) -> None:
        if not self.saved:
            return
        save_checkpoint(
            Path(self.saved_model_file), self.config, self.model, asdict(self.progress),
            optimizers=self._optimizers() if loader is not None else None,
            scaler=self.stepper.scaler.state_dict(), random=random_state(loader),
            best=self.best, best_valid_result=self.best_valid_result,
            finished=finished)

    def _optimizers(self) -> dict[str, dict]:
        """The state of the stage's optimiser, or of those that RecBole's trainer switches between."""
        found = {name: value for name, value in vars(self).items()
                 if isinstance(value, torch.optim.Optimizer)}
        special = {name: value for name, value in found.items() if name != "optimizer"}
        return {name: value.state_dict() for name, value in (special or found).items()}

    def _restore(self) -> dict:
        path = Path(self.saved_model_file)
        state = load_checkpoint(path, self.config, self.model)
        with restoring(path):
            self.progress = Progress.of(state["progress"])
            self.best, self.best_valid_result = state["best"], state["best_valid_result"]
            if self.best is not None:
                check_form("best", self.best["weights"], self.model.state_dict())
            self.stepper.scaler.load_state_dict(state["scaler"])
            set_random_state(state["random"])
        if self.verbose:
            message = f"resumed from {path}: stage {self.progress.stage}, epoch {self.progress.epoch}"
            self.logger.info(set_color(message, "green"))
        return state

    def _restore_inside_stage(self, state: dict, loader) -> None:
        if self.progress.epoch == 0:
            return  # Saved between two stages: this one starts by its own seed.
        with restoring(Path(self.saved_model_file)):
            for name, optimizer in (state["optimizers"] or {}).items():
                load_optimizer(getattr(self, name), optimizer)
            set_random_state(state["random"], loader)

    def _build_optimizer(self, **kwargs):
        parameters = list(kwargs.pop("params", self.model.parameters()))
        if not parameters:
            return None
        decay = kwargs.pop("weight_decay", self.weight_decay)
        # RecBole warns of reg_weight beside a weight decay, but ours belong to different stages.
        told = 0.0 if hasattr(self.model, "stages") else decay
        optimizer = super()._build_optimizer(params=parameters, weight_decay=told, **kwargs)
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = decay
        if self.config["fused_optimizer"] and isinstance(optimizer, torch.optim.Adam):
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = True, None
        return optimizer if self.staged else distributed.averaging(optimizer)


def _or(value, default):
    return default if value is None else value


def _short(loss) -> str:
    values = loss if isinstance(loss, (list, tuple)) else [loss]
    return " ".join(f"{value:.4f}" for value in values)
