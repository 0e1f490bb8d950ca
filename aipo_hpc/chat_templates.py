"""Chat templates by name, and a model folder that has one of them in place of its own.

A recipe's template reaches generation, ranking by the policy, reference and training in one way only: the run's initial
policy is a folder of the run whose files lead to the model's, except for the template. What is trained from it inherits it.
"""

import hashlib
import json
import os
from difflib import get_close_matches
from pathlib import Path

from aipo_hpc.durable import sync_folder, write_synced
from aipo_hpc.errors import RecipeError

TEMPLATE = "chat_template.jinja"
"""Where a tokenizer's folder holds its chat template."""
_SUFFIX = ".jinja"
_OWN = {TEMPLATE, "chat_template.json", "tokenizer_config.json"}


def names() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(path.stem for path in _folder().glob(f"*{_SUFFIX}"))


def read_template(name_or_path: str) -> str:
    """The text of the template of that name, or of that file. Raises RecipeError if there is none or it is no template."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    known = names()
    path = _folder() / f"{name_or_path}{_SUFFIX}" if name_or_path in known else Path(name_or_path).expanduser()
    if not path.is_file():
        close = get_close_matches(name_or_path, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"chat_template={name_or_path!r}: neither one of {', '.join(known)} nor a file.{hint} "
            "Leave it unset for the tokenizer's own."
        )
    try:
        text = path.read_text(encoding="utf-8")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.parse(_without_generation_marks(text))
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        raise RecipeError(f"chat_template={name_or_path!r}: {path} is not a Jinja template: {error}") from error
    return text


def template_digest(text: str) -> str:
    """What a template is, in short."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_templated_folder(model: Path, text: str, folder: Path) -> None:
    """Make ``folder`` be ``model`` with the template ``text``: links to its files, and settings without its own template.

    It appears at once and is never changed: one that is there already is kept.
    """
    if folder.is_dir():
        return
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    new.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.is_file() and path.name not in _OWN:
            link = new / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    write_synced(new / "tokenizer_config.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    write_synced(new / TEMPLATE, text)
    sync_folder(new)
    try:
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # another launch was faster otherwise
            raise


def _without_generation_marks(text: str) -> str:
    """Transformers' own tag for what the assistant says is unknown to plain Jinja."""
    return text.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def _folder() -> Path:
    return Path(__file__).parent / "templates"
