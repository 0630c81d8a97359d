"""Pages of the documentation site that are written from the code, and links out of `docs/`.

Generated: the configuration reference (from the dataclasses), the schema of `results.json`, the
API reference (a directive for each public name), and copies of pages that live elsewhere in the
repository. `llms.txt` lists every page with the question that it answers.
"""

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# File of the repository → its page of the site.
COPIES = {
    "README.md": "index.md",
    "BUILD_NOTES.md": "build-notes.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/accelerators.md": "accelerators.md",
}
_CONFIGS = (
    ("config", "StudyConfig", ""),
    ("config", "ModelConfig", "model"),
    ("data.prompts", "PromptConfig", "prompts"),
    ("config", "GenerationConfig", "generation"),
    ("config", "BaselineConfig", "baseline"),
    ("config", "HarvestConfig", "harvest"),
    ("config", "ConceptConfig", "concepts"),
    ("unlearning.config", "UnlearnConfig", "unlearn"),
    ("models.lora", "LoRAConfig", "unlearn.lora"),
    ("unlearning.dose", "DoseConfig", "dose"),
    ("config", "SensitivityConfig", "sensitivity"),
    ("config", "CheckpointConfig", "checkpoints"),
)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {page: (ROOT / path).read_text(encoding="utf-8") for path, page in COPIES.items()}
    package = griffe.load("ema_jax", search_paths=[str(ROOT)])
    pages["reference/config.md"] = _config_page(package)
    pages["reference/api.md"] = _api_page()
    pages["reference/results-schema.md"] = _schema_page()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between the repository's files, as links between the site's pages."""
    here = page.file.src_uri
    source = next((path for path, copy in COPIES.items() if copy == here), f"docs/{here}")

    def link(match: re.Match) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = COPIES.get(file) or (file[5:] if file.startswith("docs/") else None)
        if target is None:  # a file that is no page: its name says enough; a dead link stays one
            return text if (ROOT / file).exists() else match[0]
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(link, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Writes `llms.txt`: every page's title and first sentence."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for path in sorted(Path(config.docs_dir).rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        body = " ".join(text.split("\n\n")[1].split())
        question = re.split(r"(?<=[?.]) ", body)[0]
        name = path.relative_to(config.docs_dir).with_suffix("").as_posix()
        lines.append(f"- [{title}]({name}/): {question}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _config_page(package: griffe.Module) -> str:
    parts = [
        "# Configuration",
        "This page answers: which fields does a study's config have, what do they mean and what "
        "are their defaults? It is written from the dataclasses in the code. Any field can be set "
        "in a config file or on the command line: `--config.unlearn.beta=0.2`. The settings in "
        "`arms.NAME` replace those of `unlearn` for one arm.",
    ]
    for module, name, prefix in _CONFIGS:
        found = package[f"{module}.{name}"]
        sections = found.docstring.parse("google")
        parts.append(f"## `{prefix or 'the study'}`\n\n{sections[0].value}")
        meaning = {
            item.name: " ".join(item.description.split())
            for section in sections
            if section.kind is griffe.DocstringSectionKind.attributes
            for item in section.value
        }
        parts.append(_fields(found, prefix, meaning))
    return "\n\n".join(parts) + "\n"


def _fields(found: griffe.Class, prefix: str, meaning: dict[str, str]) -> str:
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for name, member in found.attributes.items():
        if name.startswith("_") or "property" in member.labels or member.annotation is None:
            continue
        field = f"{prefix}.{name}" if prefix else name
        default = str(member.value or "").replace("|", "\\|")
        if default.endswith("Config()"):
            default = f"[below](#{field.replace('.', '')})"
        elif default:
            default = f"`{_default(default)}`"
        about = meaning.get(name, "").replace("|", "\\|")
        rows.append(f"| `{field}` | {default} | {about} |")
    return "\n".join(rows)


def _default(text: str) -> str:
    """A default as one would write it in a config; one that is computed is left to its meaning."""
    factory = re.search(r"default_factory=(?:lambda: )?(.*?)(?:, hash=False)?\)$", text)
    shown = {"dict": "{}"}.get(factory[1], factory[1]) if factory else text
    try:
        ast.literal_eval(shown)
    except ValueError:
        return "…"
    return shown


def _api_page() -> str:
    tree = ast.parse((ROOT / "ema_jax/__init__.py").read_text(encoding="utf-8"))
    home = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME"
    )
    parts = [
        "# API",
        "This page answers: which names does `import ema_jax` give, what do they take and return? "
        "Shapes are jaxtyping's. Importing the package has no side effects and touches no device.",
    ]
    for name, place in home.items():
        module, _, attribute = place.partition(":")
        parts.append(f"## `ema_jax.{name}`\n\n::: {module}.{attribute or name}")
    return "\n\n".join(parts) + "\n"


def _schema_page() -> str:
    schema = json.loads((ROOT / "ema_jax/study/results.schema.json").read_text(encoding="utf-8"))
    parts = [
        "# Schema of results.json",
        "This page answers: which fields does `results.json` have, and of which types? It is "
        "written from `ema_jax/study/results.schema.json`; [what the figures mean](../results.md) "
        "is a page of its own. A field in italics may be absent.",
        "## The file\n\n" + _properties(schema),
    ]
    for name, entry in sorted(schema["$defs"].items()):
        about = entry.get("description", "")
        parts.append(f"## {name}\n\n{about}\n\n{_properties(entry)}")
    return "\n\n".join(parts) + "\n"


def _properties(entry: dict[str, Any]) -> str:
    if "properties" not in entry:
        return f"Type: {_type(entry)}"
    rows = ["| field | type | |", "|---|---|---|"]
    for name, field in entry["properties"].items():
        shown = f"`{name}`" if name in entry.get("required", ()) else f"*`{name}`*"
        rows.append(f"| {shown} | {_type(field)} | {field.get('description', '')} |")
    return "\n".join(rows)


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_type(choice) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{x}`" for x in field.get("enum", [field.get("const")]))
    kind = field.get("type", "anything")
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"name → {_type(field['additionalProperties'])}"
    return str(kind)
