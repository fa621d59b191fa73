"""The Hub's checks of a model card's metadata, as far as its error messages tell them."""

import re

import yaml

FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
# As listed in the Hub's own refusal, https://github.com/huggingface/huggingface_hub/issues/4218.
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other""".split()
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")
RESULT_PARTS = {"task": ["type"], "dataset": ["type", "name"]}  # and metrics: type and value of each


def card_metadata(card: str):
    """What the front matter of a model card says, None where there is none. Raises YAMLError."""
    block = FRONT_MATTER.match(card)
    return yaml.safe_load(block.group(1)) if block else None


def card_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card."""
    try:
        metadata = card_metadata(card) or {}
    except yaml.YAMLError as error:
        return [f"bad YAML metadata: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    checks = (license_errors, type_errors, model_index_errors)
    return [error for check in checks for error in check(metadata)]


def values_of(metadata: dict, key: str) -> list:
    """The values of a key that may hold one or a list of them."""
    value = metadata.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def license_errors(metadata: dict):
    for value in values_of(metadata, "license"):
        if not isinstance(value, str):
            yield '"license" must be a string'
        elif value not in LICENSES:
            yield f'"license" must be one of [{", ".join(LICENSES)}, array]'


def type_errors(metadata: dict):
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("tags", "datasets", "metrics", "base_model", "language"):
        for value in values_of(metadata, key):
            if not isinstance(value, str):
                yield f'"{key}" must be a string or an array of strings'
            elif key == "language" and not LANGUAGE.fullmatch(value):
                yield f'"language" with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code'


def model_index_errors(metadata: dict):
    for i, model in enumerate(values_of(metadata, "model-index")):
        yield from missing(model, ["name", "results"], f"model-index[{i}]")
        for j, result in enumerate((model.get("results") or []) if isinstance(model, dict) else []):
            where = f"model-index[{i}].results[{j}]"
            for part, keys in RESULT_PARTS.items():
                yield from missing(result.get(part), keys, f"{where}.{part}")
            for k, metric in enumerate(result.get("metrics") or [None]):
                yield from missing(metric, ["type", "value"], f"{where}.metrics[{k}]")


def missing(part, keys: list[str], where: str):
    return [f'"{where}.{key}" is required' for key in keys if not isinstance(part, dict) or key not in part]
