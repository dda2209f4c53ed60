"""OK-VQA: questions about COCO images that need knowledge of the world; 5,046 in the validation split.

OpenEnded_mscoco_{val2014,train2014}_questions.json   mscoco_{val2014,train2014}_annotations.json
val2014/, train2014/: images
"""

from megatron_mm1.evaluation.tasks.base import OpenQuestionBenchmark
from megatron_mm1.evaluation.tasks.coco_questions import question_records
from megatron_mm1.evaluation.tasks.files import Records


class OKVQA(OpenQuestionBenchmark):
    """Compared with the answers as people gave them.

    The files also have them stemmed, for models whose answers are stemmed before they are compared (OpenFlamingo's,
    by a library of word forms); we stem neither [C].
    """

    def evaluation_records(self) -> Records:
        return self._records("val2014")

    def training_records(self) -> Records:
        return self._records("train2014")

    def _records(self, split: str) -> Records:
        return question_records(
            self.images,
            questions=self.folder / f"OpenEnded_mscoco_{split}_questions.json",
            annotations=self.folder / f"mscoco_{split}_annotations.json",
            image_folder=split,
            answer_field="raw_answer",
        )
