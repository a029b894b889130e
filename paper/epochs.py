"""The test over a thousand epochs of fine-tuning, without validation: the paper's protocol.

    python mmcpr.py --valid 0 --epochs 20
    python -m paper.epochs --init emb.npz --valid 0 --eval-every 50 --metrics mmcpr.json
    python -m paper.epochs --init random --valid 0 --eval-every 50 --metrics random.json
    python -m paper.epochs --figure epochs.png mmcpr.json random.json

The paper names a thousand epochs, and no validation. Here no epoch is chosen: every --eval-every
epochs the test is ranked, and all of these results are written. The options are those of
finetune.py that say how to train, with one seed. An interrupted run goes on with --resume.
"""
import json
import shlex
import sys
from pathlib import Path

import run  # before the libraries: from here on Ctrl-C ends in one line

from tqdm import tqdm

import data
import disk
import finetune
from paper.figures import draw_lines, plot


def train(parts, init, args, checkpoint, write):
    """Trains as finetune.finetune does; calls write(points) after every test.

    points: [{"epoch": int, "loss": float, "recall@20": float, ...}], epoch 0 without a loss.
    Returns the progress: its points, the last epoch, and whether Ctrl-C ended the training.
    """
    training = finetune.start_training(parts, init, args, args.seeds[0], args.device)
    model, optimizer = training.model, training.optimizer
    # The loop asks of "best" only whether there is anything to hand over. Here all points are.
    progress = checkpoint.restore(model, optimizer) or {"epoch": -1, "best": None}
    with checkpoint.loop(progress, args.epochs, "fine-tuning", 0) as epochs:
        for epoch in epochs:
            # Epoch 0 is the tables as given.
            loss = finetune.train_epoch(training, epoch, args) if epoch > 0 else None
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                test, _ = finetune.rank_test(*model.embed(), parts)
                points = (progress["best"] or []) + [{"epoch": epoch, "loss": loss} | test]
                progress["best"] = points
                epochs.set_postfix({"loss": loss, "test recall@20": f"{test['recall@20']:.4f}"})
                write(points)
            progress["epoch"] = epoch
            checkpoint.update(model, optimizer, progress)
    return progress


def train_and_write(args):
    arrays, _, parts, data_options = finetune.open_init_and_data(args)

    def write(points):
        found = {"data": data_options, "init": args.init, "scale": args.scale,
                 "seed": args.seeds[0], "points": points}
        disk.write_file(args.metrics, lambda file: json.dump(found, file, indent=1), "w")

    # With the curve's name, so that --resume continues this curve and overwrites no other.
    with finetune.open_checkpoint("epochs", args, parts, arrays,
                                  metrics=args.metrics) as checkpoint:
        # The first test is written before any training: it would overwrite an earlier curve.
        if checkpoint.training is None and Path(args.metrics).exists():
            raise run.InputError(f"{args.metrics} is there, and would be written over; name "
                                 "another, or delete it")
        progress = train(parts, arrays, args, checkpoint, write)
    if progress["interrupted"]:
        raise run.InputError(f"interrupted at epoch {progress['epoch']}; {args.metrics} has the "
                             f"tests so far; {checkpoint.remedy()}")
    checkpoint.remove()
    print(f"wrote {args.metrics}; next: python -m paper.epochs --figure epochs.png "
          f"{shlex.quote(args.metrics)}")


def draw(path, curve_files):
    """A PNG of test Recall@20 and NDCG@20 by epoch; a curve is named after its file."""
    panels = {}
    for metric in ("recall@20", "ndcg@20"):
        curves = {}
        for file in map(Path, curve_files):
            points = read_points(file)
            epochs = [point["epoch"] for point in points]
            curves[file.stem] = (epochs, [[point[metric]] for point in points])
        panels[f"test {metric}"] = curves
    plot(path, panels, draw_lines, "epoch of fine-tuning")
    print(f"wrote {path}")


def read_points(path):
    try:
        points = json.loads(path.read_text())["points"]
        if all({"epoch", "recall@20", "ndcg@20"} <= set(point) for point in points):
            return points
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise run.InputError(f"{path}: not there, or not what paper.epochs writes; name its --metrics")


def check_arguments(args, parser):
    allowed = {"metrics", "resume", "checkpoint_every"}
    for name in sorted({"patience", *data.BESIDE} - allowed):
        if getattr(args, name) != parser.get_default(name):
            raise run.InputError(f"--{name.replace('_', '-')}: paper.epochs writes --metrics alone "
                                 "and stops at --epochs; leave it out")
    if len(args.seeds) > 1 or args.curves:
        raise run.InputError("paper.epochs trains one seed, and draws only with --figure; leave "
                             "out further --seeds and JSON files")
    finetune.check_arguments(args)
    if not args.metrics:
        raise run.InputError("--metrics must say where the curve goes")


def main(argv=None):
    parser = finetune.arguments()
    parser.prog, parser.description = "python -m paper.epochs", "Test over the epochs, and draw it."
    parser.add_argument("--figure", metavar="PNG", help="draw the curves here, and train nothing")
    parser.add_argument("curves", nargs="*", metavar="JSON", help="of earlier --metrics")
    args = parser.parse_args(argv)
    if args.figure:
        if not args.curves:
            raise run.InputError("--figure draws the files that follow it; name some")
        disk.check_outputs([args.figure], args.curves)
        draw(args.figure, args.curves)
        return
    check_arguments(args, parser)
    train_and_write(args)


if __name__ == "__main__":
    sys.exit(run.cli(main))
