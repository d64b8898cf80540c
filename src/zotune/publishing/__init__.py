"""What is made of a finished run for others: a model card and the files of a repository on the Hugging Face Hub."""

from zotune.publishing.card import model_card
from zotune.publishing.files import PublishedFiles
from zotune.publishing.upload import Upload, upload

__all__ = ["PublishedFiles", "Upload", "model_card", "upload"]
