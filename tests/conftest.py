"What several test files are given: small random models of every class, each built once."

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "A function from a model's name to its folder, each built once"
    from sd_models import build

    root, built = tmp_path_factory.mktemp("models"), {}

    def get(name):
        if name not in built:
            built[name] = str(build(name, root / name))
        return built[name]

    return get


@pytest.fixture
def fresh(folders):
    "A function from a model's name to a denoiser of its own, with guidance 3"
    from ddpo_scratch.models import sd

    def get(name, *dtype, **options):
        return sd.denoiser_for(sd.load_pipeline(folders(name), *dtype, **options), 3.0)

    return get
