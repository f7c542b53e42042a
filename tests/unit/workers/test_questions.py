from service.shared.messages import Aspect, ClosedAnswer, FindingName
from workers.questions import questions_about


def test_every_finding_is_asked_for_by_a_question_of_its_own() -> None:
    asked = questions_about(tuple(FindingName), slices_shown=[1])
    presences = [question.finding for question in asked if question.aspect is Aspect.PRESENCE]
    assert presences == list(FindingName)
    assert len({question.text for question in asked}) == len(asked)


def test_the_first_question_is_whether_the_study_is_a_chest_ct() -> None:
    assert questions_about([FindingName.NODULE], [1])[0].aspect is Aspect.CHEST_CT
    assert questions_about([], [1]) == ()


def test_only_slices_that_the_model_was_shown_can_be_chosen() -> None:
    asked = questions_about([FindingName.NODULE], slices_shown=[2, 5, 11])
    (slices,) = [question.answers for question in asked if question.aspect is Aspect.SLICE]
    assert slices == ("2", "5", "11")


def test_no_slice_is_asked_for_where_none_was_shown() -> None:
    asked = questions_about([FindingName.NODULE], slices_shown=[])
    assert Aspect.SLICE not in {question.aspect for question in asked}


def test_an_effusion_may_be_on_both_sides_and_a_nodule_on_one() -> None:
    sides = {
        question.finding: question.answers
        for question in questions_about(tuple(FindingName), [1])
        if question.aspect is Aspect.SIDE
    }
    assert "both" in sides[FindingName.EFFUSION]
    assert "both" not in sides[FindingName.NODULE]


def test_the_most_probable_answer_is_the_chosen_one() -> None:
    answer = ClosedAnswer(
        finding=FindingName.NODULE,
        aspect=Aspect.SIDE,
        question="Which side?",
        answers=("right", "left"),
        probabilities=(0.25, 0.75),
    )
    assert (answer.chosen, answer.probability) == ("left", 0.75)
