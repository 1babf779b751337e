"""
For the site's API pages: docstrings as Markdown, and as Python has them where a decorator of transformers writes them.

`auto_docstring` fills in the arguments that all models share when a module is imported, so they do not stand in the
source, which is all that mkdocstrings reads.
"""

import inspect
import re
from importlib import import_module

import griffe


# Whose docstrings are written by a decorator.
MODULES = ("modeling_reformer", "configuration_reformer")
GLOSSARY = "https://huggingface.co/docs/transformers/glossary"
# Advice that is the same for every model of transformers.
TIP = re.compile(r"<Tip>.*?</Tip>", re.DOTALL)
# The type of an argument, which the site writes as code anyway.
TYPE = re.compile(r"^( +\w+ )(\(.+\)):$", re.MULTILINE)
REFERENCE = re.compile(r"\[(`[^`]+`)\](?!\()")
# A paragraph behind the arguments, before which the decorator puts no more of them.
REMARK = re.compile(r"^ {4}[A-Z][^\n]*\n(?: {4}(?!\w+ \()\S[^\n]*\n)*", re.MULTILINE)
# Lines typed at Python's prompt, and what it answers, up to an empty line.
SESSION = re.compile(r"(?:^>>> .*\n(?:^(?!```).+\n?)*)", re.MULTILINE)
INTRODUCTION = re.compile(r"^\s*The `?\[?`?\w+`?\]?`? forward method, overrides the `__call__` special method\.", re.M)


def cleaned(docstring: str) -> str:
    """A docstring of transformers as Markdown for any site."""
    text = TIP.sub("", inspect.cleandoc(docstring)).replace("../glossary", GLOSSARY)
    text = INTRODUCTION.sub("", REFERENCE.sub(r"\1", text).replace("`~", "`"))
    text = TYPE.sub(lambda match: match[1] + re.sub("[`*]", "", match[2]) + ":", text)
    remarks = [inspect.cleandoc(remark) for remark in REMARK.findall(text)]
    before, heading, after = REMARK.sub("", text).strip().partition("Args:\n")
    return before + "".join(f"{remark}\n\n" for remark in remarks) + heading + after


def fenced(docstring: str) -> str:
    """With what is typed at Python's prompt as a block of code, if it is none."""
    if "```" in docstring:
        return docstring
    return SESSION.sub(lambda match: f"```python\n{match[0].rstrip()}\n```\n", docstring)


class RuntimeDocstrings(griffe.Extension):
    """
    Replaces the docstrings of the models and their config by those that they have when the package is imported; in
    others, makes examples blocks of code.
    """

    def _replace(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
        if obj.module.name not in MODULES or not obj.is_public:
            return
        module = import_module(obj.module.path)
        found = module
        for name in obj.path.removeprefix(f"{module.__name__}.").split("."):
            found = getattr(found, name, None)
        docstring = getattr(found, "__doc__", None)
        if docstring:
            obj.docstring = griffe.Docstring(cleaned(docstring), parent=obj)

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        """Called by griffe for a class and what is in it."""
        self._replace(cls)

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        """Called by griffe for a function."""
        self._replace(func)
