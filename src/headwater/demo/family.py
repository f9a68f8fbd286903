"""Prints reasoning-gym's family questions as JSON lines: ``python family.py WHEEL COUNT SEED``, in its own process.

The one generator that is needed is imported straight out of the wheel. Installing the package would bring a dozen
others that this generator does not use, and importing it normally imports every other generator.
"""

import importlib
import json
import sys
import types


def main(wheel: str, count: int, seed: int) -> None:
    """Write `count` lines ``{"question": str, "answer": str}`` to standard output."""
    for name in ("reasoning_gym", "reasoning_gym.graphs"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    module = importlib.import_module("reasoning_gym.graphs.family_relationships")
    config = module.FamilyRelationshipsConfig(min_family_size=4, max_family_size=5, seed=seed, size=count)
    for item in module.FamilyRelationshipsDataset(config):
        print(json.dumps({"question": item["question"], "answer": item["answer"]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
