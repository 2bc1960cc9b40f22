import sys, logging, tempfile
from pathlib import Path
from tests.tiny import make
from llmkd.distributed import ranks
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    d = Path(tempfile.mkdtemp())
    make(d)
    w = ranks.start(60)
    import time

    t = time.time()
    r = load_recipe(d / "recipe.yaml").changed(
        {
            "loss.ce": 0.0,
            "loss.divergence": "reverse_kl",
            "rollouts": {
                "max_new_tokens": 20,
                "every": 2,
                "share": 0.6,
                **eval(sys.argv[1] if len(sys.argv) > 1 else "{}"),
            },
            "train.steps": 6,
        }
    )
    train(w, jobs.distil_job(w, r, d / "run"))
    print(time.time() - t)
    import os

    os.system(f"ls -R {d}/run; cat {d}/run/rollouts.jsonl; cat {d}/run/rollouts/*.log")


main()
