"""What a finished run leaves: the adapter or the model, the loss curve, the summary."""

from medmax_fast.files import write_json
from medmax_fast.model.adapter import save_adapter
from medmax_fast.model.checkpoint_base import Changed
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.trainable import EMBEDDINGS, HEAD, PREFIX
from medmax_fast.model.trained import Trained
from medmax_fast.training import engine as ds
from medmax_fast.training.processes import on_first_rank
from medmax_fast.training.run import Run


def finish(run: Run, base: str) -> dict:
    """Write the result of a run that has done all its steps; `base` is the checkpoint's sha256.

    With an adapter that is a peft folder, with trained rows of head and embeddings as whole saved modules; else a
    checkpoint in the layout of the base. All ranks call this and get the summary.
    """
    state = ds.trained_state(run.engine)
    trained = Trained(state, state.__getitem__, run.folder.path, run.checkpoint)
    adapted = not run.config.full and run.config.lora_rank > 0
    path = run.folder.path / ("adapter" if adapted else "model")

    def write() -> dict:
        # Complete if there: an earlier run was stopped right after writing it.
        if not path.exists() and not adapted:
            write_checkpoint(Changed(run.checkpoint, trained.apply, trained.dtype), path, run.checkpoint.layout)
        elif not path.exists():
            lora = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if ".lora_" in name}
            chosen = {HEAD: run.config.head, EMBEDDINGS: run.config.embeddings}
            names = [f"{module}.weight" for module, rows in chosen.items() if rows != "none"]
            saved = {name: trained.apply(name, run.checkpoint.tensor(name)) for name in names}
            save_adapter(lora, saved, path, run.config, base)
        return _summary(run, path)

    return on_first_rank(write)


def _summary(run: Run, result) -> dict:
    from medmax_fast.figures import loss_curve

    records, validation = run.folder.records(), run.folder.records(run.folder.validation)
    loss_curve(records, run.folder.curve, validation)
    parameters = [p for p in run.engine.module.parameters() if p.requires_grad]
    last = records[-1] if records else {}
    names = ("loss", "text_loss", "image_loss", "tokens_per_second", "mfu", "memory_gib")
    summary = {
        "output": str(run.folder.path),
        result.name: str(result),
        "steps": run.done,
        "resumed_from": run.resumed_from,
        "rows_left_out": len(run.loader.left_out),
        "rows_cut": len(run.loader.cut),
        "trained_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "first_loss": records[0]["loss"] if records else None,
        **{name: last.get(name) for name in names},
        "validation_loss": validation[-1]["loss"] if validation else None,
        "already_finished": False,
    }
    write_json(run.folder.result, summary)
    return summary
