"""VQAv2: open questions about COCO images, ten answers each; 214,354 in the validation split.

v2_OpenEnded_mscoco_{val2014,train2014}_questions.json   v2_mscoco_{val2014,train2014}_annotations.json
val2014/, train2014/: images
"""

from megatron_mm1.evaluation.tasks.coco_questions import COCOQuestions


class VQAv2(COCOQuestions):
    """Evaluated on the validation split: the answers of the test splits are not public."""

    prefix = "v2_"
    answer_field = "answer"
