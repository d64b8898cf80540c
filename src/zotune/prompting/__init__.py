"""Search for a prompt: templates and label words by their scores on a task's rows."""

from zotune.prompting.arguments import PromptArguments
from zotune.prompting.run import SearchResult, search

__all__ = ["PromptArguments", "SearchResult", "search"]
