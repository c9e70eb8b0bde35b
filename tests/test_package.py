"The package's front door: its names, found where they live, when they are asked for."

import subprocess
import sys

import pytest

import ddpo_scratch


def test_public_names_are_those_of_their_modules():
    from ddpo_scratch import TrainConfig, fit, get_prompt_fn, get_reward, load, preset
    from ddpo_scratch.config import TrainConfig as config
    from ddpo_scratch.train import fit as trained

    assert TrainConfig is config and fit is trained
    assert all(map(callable, (get_reward, get_prompt_fn, load, preset)))
    assert {"fit", "TrainConfig", "preset"} <= set(dir(ddpo_scratch))


def test_package_says_what_it_is_and_an_unknown_name_is_an_attribute_error():
    assert "fit(preset(" in ddpo_scratch.__doc__
    with pytest.raises(AttributeError, match="'ddpo_scratch' has no attribute 'fitt'"):
        ddpo_scratch.__getattr__("fitt")


def test_importing_the_package_imports_nothing_large():
    code = (
        "import sys, ddpo_scratch; print(*{'torch', 'pydantic', 'yaml', 'tyro'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
