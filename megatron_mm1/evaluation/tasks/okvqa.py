"""OK-VQA: questions about COCO images that need knowledge of the world; 5,046 in the validation split.

OpenEnded_mscoco_{val2014,train2014}_questions.json   mscoco_{val2014,train2014}_annotations.json
val2014/, train2014/: images
"""

from megatron_mm1.evaluation.tasks.coco_questions import COCOQuestions


class OKVQA(COCOQuestions):
    """Compared with the answers as people gave them.

    The files also have them stemmed, for models whose answers are stemmed before they are compared (OpenFlamingo's,
    by a library of word forms); we stem neither [C].
    """

    prefix = ""
    answer_field = "raw_answer"
