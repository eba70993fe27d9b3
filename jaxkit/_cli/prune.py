"""``python -m jaxkit prune``: set the smallest weights of a checkpoint to zero, leaf by leaf."""

import argparse

from jaxkit._cli import merge


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from jaxkit import tree, weights
    from jaxkit.weights import files, stream
    from jaxkit.weights.sparsify import after, window

    if not args.output and not args.dry_run:
        raise ValueError("give the output, -o FILE.safetensors (or --dry-run)")
    if not 0 <= args.sparsity < 1:
        raise ValueError(f"--sparsity {args.sparsity}: the fraction of zeros in [0, 1) was due")
    keep = weights.average()
    prune = lambda sparsity, scope: after(window(sparsity, 0.0, scope), keep)._replace(
        needs_base=False
    )
    if args.allocation == "erk":
        from jaxkit import masks

        leaves = {
            path: np.broadcast_to(np.float32(0), leaf.shape)
            for path, leaf in files.leaves(args.file).items()
            if stream.is_float(leaf.dtype)
        }
        each = masks.erk(leaves, args.sparsity, where=args.where)
        chosen = tree.chosen(leaves, args.where)
        rules = [
            stream.Rule(lambda p, _, path=path: p == path, prune(each[path], "leaf"), 1.0, "pruned")
            for path in chosen
            if each[path] > 0
        ]
    else:
        scope = "tree" if args.allocation == "global" else "leaf"
        rules = [stream.Rule(args.where, prune(args.sparsity, scope), 1.0, "pruned")]
    tasks = stream.plan(None, [args.file], rules)
    if args.dry_run:
        merge.table(tasks)
        return 0
    with merge.bar(tasks) as progress:
        stream.merge_files(
            args.output, None, [args.file], rules, overwrite=args.overwrite, progress=progress
        )
    merge.summary(tasks)
    print(f"wrote {args.output}")
    return 0
