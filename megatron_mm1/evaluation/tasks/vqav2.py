"""VQAv2: open questions about COCO images, ten answers each; 214,354 in the validation split.

v2_OpenEnded_mscoco_{val2014,train2014}_questions.json   v2_mscoco_{val2014,train2014}_annotations.json
val2014/, train2014/: images
"""

from megatron_mm1.evaluation.tasks.base import OpenQuestionBenchmark
from megatron_mm1.evaluation.tasks.coco_questions import question_records
from megatron_mm1.evaluation.tasks.files import Records


class VQAv2(OpenQuestionBenchmark):
    """Evaluated on the validation split: the answers of the test splits are not public."""

    def evaluation_records(self) -> Records:
        return self._records("val2014")

    def training_records(self) -> Records:
        return self._records("train2014")

    def _records(self, split: str) -> Records:
        return question_records(
            self.images,
            questions=self.folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
            annotations=self.folder / f"v2_mscoco_{split}_annotations.json",
            image_folder=split,
            answer_field="answer",
        )
